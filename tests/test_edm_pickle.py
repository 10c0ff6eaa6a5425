"""common/machinery/edm_pickle.py: pickles like NVIDIA's are read, and nothing else."""

import io
import json
import os
import pickle
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_files import (
    NETS, Call, Persistent, dump, edm_object, saved, small, tensor_of, vector_of, with_weight,
)
from guarded import read, write
from torch import nn

from common import UsageError
from common import teacher as teachers
from common.diffusion import Denoiser
from common.machinery.edm_pickle import NAMES, PUBLIC, TAKEN, read_edm_pickle
from common.machinery.files import cache_dir
from common.teacher import ARCHS, load_teacher, read_teacher

ROOT = Path(__file__).parent.parent
SHAPES = json.loads((ROOT / "tests" / "golden" / "unet_shapes.json").read_text())
CPU = torch.device("cpu")


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where the embedded source would leave its file
    yield tmp_path / "cache"
    assert not Path("HACKED").exists()


# -------------------------------------------------------------------------------- reading


def relaid(module, layout):
    """The weights of a Persistent module and of all below it, in another type or order."""
    changes = {
        "float32": lambda w: w,
        "float16": lambda w: w.half(),
        "float64": lambda w: w.double(),
        "channels_last": lambda w: w.to(memory_format=torch.channels_last) if w.ndim == 4 else w,
        "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1) if w.ndim > 1 else w,
    }
    for part in (module, *module._modules.values()):
        if part is not module:
            relaid(part, layout)
        for weights in (part._parameters, part._buffers):
            for name, weight in weights.items():
                if weight is not None:
                    weights[name] = nn.Parameter(changes[layout](weight.detach()), False)


@pytest.mark.parametrize("protocol,layout", [(2, "float32"), (4, "float16")])
@pytest.mark.parametrize("label_dim,augment_dim", [(0, 9), (10, 0)])
@pytest.mark.parametrize("arch", NETS)
def test_a_genuine_pickle_gives_the_same_denoiser(
    arch, label_dim, augment_dim, protocol, layout, tmp_path, cache
):
    more = {"model_channels": 64, "channel_mult": [1, 1]} if arch == "adm" else {}
    value, original = edm_object(arch, label_dim, augment_dim, **more)
    relaid(value["ema"], layout)
    if layout == "float16":
        original.half().float()
    original.to(memory_format=torch.channels_last)  # as the teacher is, for the last digits
    path = write(tmp_path, dump(value, protocol))
    x, sigma = torch.randn(3, 3, 16, 16), torch.tensor([0.01, 1.0, 70.0])
    labels = torch.tensor([1, 0, 9]) if label_dim else None
    with torch.no_grad():
        expected = original(x, sigma, labels)
    for _ in range(2):  # the second time from the copy in our own format
        loaded = load_teacher(path, "folder", CPU)
        torch.testing.assert_close(loaded(x, sigma, labels), expected, rtol=0, atol=2e-6)
        assert loaded.arch == arch
        assert loaded.net.label_dim == label_dim and loaded.net.augment_dim == augment_dim
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    copies = list(cache.glob("edm-*.safetensors"))
    assert len(copies) == 1
    copy = load_teacher(str(copies[0]), "folder", CPU)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), original.parameters()))


@pytest.mark.parametrize("protocol", [3, 5])
@pytest.mark.parametrize("layout", ["float64", "channels_last", "transposed"])
@pytest.mark.parametrize("arch", NETS)
def test_weights_in_any_dense_order_are_read(arch, layout, protocol, tmp_path, cache):
    more = {"model_channels": 64, "channel_mult": [1, 1]} if arch == "adm" else {}
    value, original = edm_object(arch, 10, 9, **more)
    relaid(value["ema"], layout)
    if layout != "float64":
        weights = value["ema"]._modules["model"]._modules["map_layer0"]._parameters
        assert weights["weight"].is_contiguous() == (layout == "channels_last")
    found = read_edm_pickle(dump(value, protocol), "edm.pkl")["weights"]
    for name, weight in original.state_dict().items():
        assert torch.equal(found[name].float(), weight) and found[name].is_contiguous()


def test_all_five_public_configurations_fit_strictly(cache, monkeypatch):
    """Their names and shapes (golden/unet_shapes.json) fit the networks of their arguments."""
    totals = set()
    for name, shapes in SHAPES.items():
        if isinstance(shapes["parameters"], str):
            continue  # the same without augment labels: tests/test_unet.py
        given = shapes["kwargs"]
        if given["model_type"] == "DhariwalUNet":
            arch = "adm"
        else:
            arch = {"positional": "ddpmpp", "fourier": "ncsnpp"}[given["embedding_type"]]
        names = ("img_resolution", "img_channels", "label_dim", "augment_dim", *TAKEN)
        kwargs = {k: given[k] for k in names if k in given}
        state = {"arch": arch, "kwargs": kwargs, "sigma_data": 0.5}
        with torch.device("meta"):
            sizes = {**shapes["parameters"], **shapes["buffers"]}
            state["weights"] = {k: torch.empty(size) for k, size in sizes.items()}
            with monkeypatch.context() as patch:
                given = state, state["weights"]
                patch.setattr(teachers, "load_weights", lambda *_: given)  # noqa: B023
                denoiser = read_teacher(name)
        total = sum(p.numel() for p in denoiser.parameters())
        assert total == shapes["param_count"]
        totals.add(total)
    assert totals == {55_733_891, 55_735_299, 56_397_827, 56_400_643, 295_899_267}


@pytest.mark.slow
def test_a_full_size_cifar10_pickle(tmp_path, cache):
    """223 MB, all 55.7 million weights of DDPM++."""
    value, original = edm_object(
        resolution=32, model_channels=128, channel_mult=[2, 2, 2], num_blocks=4,
        attn_resolutions=[16],
    )
    loaded = load_teacher(write(tmp_path, dump(value)), "cifar10", CPU)
    assert sum(p.numel() for p in loaded.parameters()) == 55_733_891
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters()))


# ------------------------------------------------------------------------------- refusing


MALICIOUS = {  # more of them, by the opcode, in test_foreign_pickles.py
    "os.system": (Call(os.system, "touch HACKED"), "system"),
    "a call inside the state": (with_weight(Call(os.system, "touch HACKED")), "system"),
    "a call in an unused part": (
        {**edm_object()[0], "loss_fn": Call(os.system, "touch HACKED")}, "system"),
    "eval": (Call(eval, "open('HACKED', 'w')"), "builtins.eval"),
    "a codec": (Call(__import__("codecs").encode, "x", "zip"), "no text in latin1"),
    "a numpy object": (with_weight(np.array([object()], dtype=object)[0:1]), "numpy"),
    "a negative offset": (with_weight(tensor_of(small, -1, (4,), (1,))), "impossible shape"),
    "a compressed storage": (
        with_weight(vector_of(saved(torch.zeros(4), _use_new_zipfile_serialization=True))),
        "compressed"),
    "a storage that is a pickle": (
        with_weight(vector_of(pickle.dumps(Call(os.system, "touch HACKED")))), "edm.pkl"),
    "a storage cut short": (with_weight(vector_of(saved(torch.zeros(4))[:-9])), "edm.pkl"),
    "a weight that is a list": (with_weight([1.0, 2.0]), "map_layer0.weight"),
    "no network": ({"loss_fn": 1}, "ema"),
    "a list": ([1, 2, 3], "edm.pkl"),
    "another preconditioning": ({"ema": Persistent("VPPrecond")}, "VPPrecond"),
    "a persistent id": (b"\x80\x02X\x01\x00\x00\x00aQ.", "outside"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_refused_in_one_line_and_never_executed(case, tmp_path, cache):
    value, named = MALICIOUS[case]
    path = write(tmp_path, value if isinstance(value, bytes) else dump(value))
    with pytest.raises(UsageError) as error:
        load_teacher(path, "folder", CPU)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    assert named in message and path in message
    assert not list(cache.glob("*.safetensors"))


def test_a_file_cut_short_anywhere_is_refused(tmp_path, cache):
    data = dump(edm_object()[0])
    for end in np.linspace(1, len(data) - 1, 12).astype(int):
        with pytest.raises(UsageError, match="not a readable EDM checkpoint|do not fit"):
            read(write(tmp_path, data[:end]))


def test_a_storage_that_promises_too_much_is_refused(tmp_path, cache):
    """The bytes say 4 values; the header is made to say 10^15."""
    data = saved(torch.zeros(4))
    at = data.index(b"K\x04", data.index(b"cpu"))  # the count, as a one-byte integer
    huge = data[:at] + b"\x8a\x07" + (10**15).to_bytes(7, "little") + data[at + 2 :]
    with pytest.raises(UsageError, match="not a readable EDM checkpoint"):
        read(write(tmp_path, dump(with_weight(vector_of(huge)))))


@pytest.mark.parametrize("name, value, message", [
    ("decoder_type", "skip", "not among ours"), ("encoder_type", "skip", "skip"),
    ("out_channels", 6, "channels"),
])  # fmt: skip
def test_a_decoder_or_channels_that_we_do_not_have(name, value, message, tmp_path, cache):
    edm, _ = edm_object()
    edm["ema"]._modules["model"]._init_kwargs[name] = value
    with pytest.raises(UsageError, match=message):
        read(write(tmp_path, dump(edm)))


# ----------------------------------------------------------------------- names and places


class Web:
    """urllib.request.urlopen with one file behind every address."""

    def __init__(self, data):
        self.data, self.asked = data, []

    def __call__(self, url, timeout):
        self.asked.append(url)
        answer = io.BytesIO(self.data)
        answer.headers = {}
        return answer


def test_a_short_name_is_downloaded_once_and_checked_afterwards(cache, monkeypatch):
    value, original = edm_object(resolution=32)
    web = Web(dump(value))
    monkeypatch.setattr(urllib.request, "urlopen", web)
    name = "edm-cifar10-32x32-uncond-vp"
    monkeypatch.setattr(teachers, "takes_gpu", lambda device: True)
    for spec in (name, name, None):  # on a GPU the default of cifar10 is the same file
        loaded = load_teacher(spec, "cifar10", CPU)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters()))
    assert web.asked == [
        "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl"
    ]
    file = cache_dir() / "edm-cifar10-32x32-uncond-vp.pkl"
    record = json.loads(Path(f"{file}.json").read_text())
    assert record["bytes"] == len(web.data) and len(record["sha256"]) == 64
    file.write_bytes(dump(edm_object(resolution=32)[0]))
    with pytest.raises(UsageError, match="no longer the file that was downloaded"):
        load_teacher("edm-cifar10-32x32-uncond-vp", "cifar10", CPU)


@pytest.mark.parametrize("spec, dataset, size", [
    (None, "imagenet64", 64), ("https://example.org/models/some.pkl", "cifar10", 32),
])  # fmt: skip
def test_any_address_and_imagenets_teacher_without_images(spec, dataset, size, cache, monkeypatch):
    value, original = edm_object(resolution=size)
    web = Web(dump(value))
    monkeypatch.setattr(urllib.request, "urlopen", web)
    loaded = load_teacher(spec, dataset, CPU)
    assert len(web.asked) == 1 and web.asked[0] in (spec, f"{PUBLIC}{teachers.PUBLIC[dataset]}.pkl")
    assert torch.equal(next(loaded.parameters()), next(original.parameters()))


@pytest.mark.parametrize("spec", [None, "edm-cifar10-32x32-cond-ve", "https://example.org/x.pkl"])
def test_without_a_network_the_line_says_what_to_do(spec, cache, monkeypatch):
    def offline(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(teachers, "takes_gpu", lambda device: True)
    with pytest.raises(UsageError) as error:
        load_teacher(spec, "cifar10", CPU)
    assert all(part in str(error.value) for part in ("no route", "by hand", str(cache), ".pkl"))
    way_without = f"--teacher {teachers.SHIPPED['cifar10']}"
    assert (way_without in str(error.value)) == (spec is None)


def test_names_are_those_of_the_public_files():
    assert len(NAMES) == 9 and all(default in NAMES for default in teachers.PUBLIC.values())
    golden = {key.rsplit("-aug", 1)[0] for key in SHAPES}
    assert {name.removeprefix("edm-") for name in NAMES} >= golden


def test_a_teacher_of_other_images_is_refused(tmp_path, cache):
    path = write(tmp_path, dump(edm_object(resolution=16)[0]))
    with pytest.raises(UsageError, match=r"\(3, 16, 16\), cifar10 has \(3, 32, 32\)"):
        load_teacher(path, "cifar10", CPU)
    with pytest.raises(UsageError, match="No such file"):
        load_teacher(str(tmp_path / "missing.pkl"), "cifar10", CPU)


def test_arguments_left_out_are_the_defaults(tmp_path, cache):
    """ImageNet-64's pickle does not name what is DhariwalUNet's own default."""
    sizes = {"model_channels": 64, "channel_mult": [1, 1]}
    value, _ = edm_object("adm", label_dim=10, augment_dim=0, **sizes)
    state = read_edm_pickle(dump(value), "edm.pkl")
    assert state["arch"] == "adm" and state["sigma_data"] == 0.5
    assert "channel_mult_emb" not in state["kwargs"]
    assert state["kwargs"]["model_channels"] == 64 and state["kwargs"]["label_dim"] == 10
    assert set(state["weights"]) == set(Denoiser(ARCHS["adm"](**state["kwargs"])).state_dict())
