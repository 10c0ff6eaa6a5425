"""What the tests of all scripts have in common: a run by its command line, and the refusal of bad input."""
import pytest

from common.training import UsageError

EVERYWHERE = [  # (arguments, what the refusal names), of any script
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
    """One line that has all `names`, before any work. Arguments that `places` knows stand for these; FOREIGN is a file of somebody else."""
    places["FOREIGN"] = tmp_path / "foreign.pt"
    places["FOREIGN"].write_bytes(b"\x80\x04not ours")
    with pytest.raises(UsageError) as error:
        run_script(script, monkeypatch, "--out", tmp_path / "run", *[places.get(a, a) for a in arguments])
    assert "\n" not in str(error.value) and all(name in str(error.value) for name in names), error.value
    assert not (tmp_path / "run" / "metrics.json").exists()
