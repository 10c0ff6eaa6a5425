"""What the tests of all scripts share: a run by its command line, what it left, what it called."""

import json
import pickle

import pytest
import torch

from common import UsageError
from common.diffusion import Denoiser
from common.machinery import run as run_module
from common.teacher import save_teacher
from common.unet import ddpmpp

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


def results(folder):
    """The rows of a run."""
    return json.loads((folder / "metrics.json").read_text())["results"]


def watch(monkeypatch, owner, name, fails_at=None):
    """A list that fills with the arguments of every call of owner.name, named ones behind.

    The call `fails_at` of them ends in a ZeroDivisionError.
    """
    calls, original = [], getattr(owner, name)

    def watched(*arguments, **named):
        calls.append((*arguments, *named.values()))
        return original(*arguments, **named) if len(calls) != fails_at else 1 / 0

    monkeypatch.setattr(owner, name, watched)
    return calls


def differences(a, b, place=""):
    """The places where two nested values differ; the seconds that something took do not count."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(key, a[key], b[key]) for key in a if key not in ("seconds", "fit_seconds")]
    elif isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        pairs = [(i, *pair) for i, pair in enumerate(zip(a, b))]
    else:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            same = a.dtype == b.dtype and a.shape == b.shape
            same = same and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
        else:
            same = type(a) is type(b) and a == b
        return [] if same else [place]
    return [found for key, *pair in pairs for found in differences(*pair, f"{place}.{key}")]


def tiny_teacher(path, label_dim=0):
    """A teacher file of a few thousand parameters, with dropout, which no student may use."""
    torch.manual_seed(0)
    kwargs = dict(
        img_resolution=8, img_channels=1, label_dim=label_dim, model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[], dropout=0.5,
    )
    denoiser = Denoiser(ddpmpp(**kwargs))
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_teacher(path, denoiser, "ddpmpp", kwargs, "digits")
    return str(path)


def write_cifar10(folder, train, test):
    """CIFAR-10's pickles, with fewer images: `train` and `test` are (bytes (n, 3, 32, 32), labels).

    `take_few_of_cifar10` lets torchvision take them, without their checksums.
    """
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    for name, (pixels, labels) in (("data_batch_1", train), ("test_batch", test)):
        value = {"data": pixels.reshape(len(pixels), -1), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(value))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def take_few_of_cifar10(monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(CIFAR10, "meta", meta)


def conditional_teacher():
    """A small network of three classes, and a list that fills with the labels that it gets."""
    torch.manual_seed(0)
    small = dict(model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    teacher = Denoiser(ddpmpp(8, 1, label_dim=3, **small)).eval().requires_grad_(False)
    seen = []
    teacher.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    return teacher, seen


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
    monkeypatch.setattr(run_module, "chosen_precision", lambda *about: (True, "bf16"))
    return seen
