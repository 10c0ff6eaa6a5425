"""What the tests of all scripts share: a run by its command line, and the refusal of bad input."""

import pytest
import torch

from common import UsageError
from common.machinery import run as run_module

EVERYWHERE = [  # (arguments, what the refusal names), of any script
    (["--dataset", "cats"], ["--dataset", "cats", "digits"]),
    (["--out", "FOREIGN"], ["--out", "foreign.pt"]),
    (["--resume"], ["checkpoint.pt"]),
    (["--device", "cuda:9"], ["--device cuda:9"]),
    (["--dataset", "folder"], ["--data-dir"]),
]


def run_script(script, monkeypatch, *arguments):
    """`python script.py ARGUMENTS`, in this process."""
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def assert_refused(script, monkeypatch, tmp_path, arguments, names, **places):
    """One line that has all `names`, before any work.

    Arguments that `places` knows stand for these; FOREIGN is a file of somebody else.
    """
    places["FOREIGN"] = tmp_path / "foreign.pt"
    places["FOREIGN"].write_bytes(b"\x80\x04not ours")
    arguments = [places.get(a, a) for a in arguments]
    with pytest.raises(UsageError) as error:
        run_script(script, monkeypatch, "--out", tmp_path / "run", *arguments)
    message = str(error.value)
    assert message.isprintable() and all(name in message for name in names), message
    assert not (tmp_path / "run" / "metrics.json").exists()


def calls_under_bfloat16(monkeypatch, owner, *names):
    """A list that fills with whether each call of owner's functions ran under autocast.

    `Run.backward` gets bfloat16 on the CPU, as on a GPU.
    """
    seen = []

    def watched(original):
        def call(*arguments):
            seen.append(torch.is_autocast_enabled("cpu"))
            return original(*arguments)

        return call

    for name in names:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(run_module, "autocast", lambda device: bfloat16)
    return seen
