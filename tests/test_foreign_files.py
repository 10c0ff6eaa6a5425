"""Other files from strangers: networks in safetensors, JSON, npz, images.

As in test_foreign_pickles: one line, soon, in little memory.
"""

import io
import json
import os
import random
import struct
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from guarded import MEASURED, guarded, one_line_refusal, read, write
from PIL import Image

from common import UsageError, unet
from common.datasets import load_dataset
from common.diffusion import Denoiser
from common.fid import load_moments
from common.machinery.files import read_npz, save_weights
from common.machinery.foreign import Refused, check_network
from common.machinery.schedule import load_schedule

pytestmark = [MEASURED, pytest.mark.usefixtures("cache")]


# -------------------------------------------------------------------------------- safetensors


def teacher_file(tmp_path, change=lambda state: None):
    """A small teacher's file, of which `change` has altered what it says."""
    path = tmp_path / "teacher.safetensors"
    kwargs = dict(model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    kwargs |= dict(img_resolution=8, img_channels=1)
    state = {"arch": "ddpmpp", "kwargs": kwargs, "sigma_data": 0.5, "kind": "teacher"}
    state["weights"] = dict(Denoiser(unet.ddpmpp(**kwargs)).state_dict())
    change(state)
    save_weights(path, state.pop("kind"), **state)
    return path


def claims(**claimed):
    return lambda state: state["kwargs"].update(claimed)


def weight(value):
    return lambda state: state["weights"].update({"model.map_layer0.bias": value})


def says(**what):
    return lambda state: state.update(what)


OURS = {
    "num_blocks 10^7": (claims(num_blocks=10**7), "num_blocks is 10000000"),
    "num_blocks 60": (claims(num_blocks=60), "claims 121 blocks"),
    "model_channels 8192": (claims(model_channels=8192), "do not fit"),
    "label_dim 10^6": (claims(label_dim=10**6), "label_dim is 1000000"),
    "channel_mult ()": (claims(channel_mult=()), "not a usable teacher"),
    "13 levels": (claims(channel_mult=[1] * 13), "channel_mult is a list"),
    "an argument that is none": (claims(family=None), "family is a NoneType"),
    "an unknown argument": (claims(families=1), "unexpected keyword argument 'families'"),
    "a family that is a word": (claims(family="adm"), "not a usable teacher"),
    "an argument of another type": (claims(dropout=[0.1]), "not a usable teacher"),
    "a word for a number": (claims(num_blocks="8"), "not a usable teacher"),
    "a fraction": (claims(num_blocks=1.5), "not a usable teacher"),
    "a bool": (claims(num_blocks=True), "num_blocks is a bool"),
    "a negative number": (claims(augment_dim=-1), "not a usable teacher"),
    "resolution 10^12": (claims(img_resolution=10**12), "img_resolution is 10000"),
    "an odd resolution": (claims(img_resolution=17, channel_mult=[1, 2]), "cannot be halved"),
    "a list in a list": (claims(channel_mult=[[1]]), "channel_mult is a list"),
    "dropout NaN": (claims(dropout=float("nan")), "dropout is nan"),
    "dropout 7": (claims(dropout=7), "dropout is 7"),
    "a filter of zeros": (claims(resample_filter=[1, -1]), "the sum 0"),
    "a filter of 3": (claims(resample_filter=[1, 2, 1]), "an odd number of weights"),
    "patch 0": (claims(patch=0), "not a usable teacher"),
    "no arguments": (says(kwargs=None), "its arguments are a NoneType"),
    "no weights": (says(weights={}), "with 0 weights"),
    "no kind": (says(arch=None), "its network is none of"),
    "an unknown kind": (says(arch="dit"), "its network is none of ddpmpp, ncsnpp"),
    "a list of kinds": (says(arch=["ddpmpp"]), "its network is none of"),
    "a velocity of phi 7": (says(flow={"phi": 7}), "its phi is not a number from 0 to 1"),
    "a velocity without phi": (says(flow=[]), "not a usable teacher"),
    "another shape": (weight(torch.zeros(3)), "model.map_layer0.bias: (3,), not (32,)"),
    "a weight too many": (lambda s: s["weights"].update(more=torch.zeros(3)), "more: (3,), not no"),
    "a weight missing": (lambda s: s["weights"].popitem(), "missing, not"),
    "NaN": (weight(torch.full((32,), np.nan)), "map_layer0.bias has values that are not finite"),
    "10^300": (weight(torch.full((32,), 1e300, dtype=torch.float64)), "not finite"),
    "sigma_data 0": (says(sigma_data=0), "sigma_data is 0"),
    "sigma_data NaN": (says(sigma_data=float("nan")), "sigma_data is nan"),
    "sigma_data 10^300": (says(sigma_data=10**300), "sigma_data is 1000"),
    "sigma_data a text": (says(sigma_data="1"), "is no number"),
    "another kind of file": (says(kind="classifier"), "it holds a classifier, not a teacher"),
    "a kind of many lines": (says(kind="a\n" * 10**6), "it holds a a a a"),
}


@pytest.mark.parametrize("case", OURS)
def test_a_hostile_teacher_is_refused(case, tmp_path):
    change, said = OURS[case]
    path = teacher_file(tmp_path, change)
    one_line_refusal(lambda: read(str(path)), said, str(path))


def packed(header, data=b"", length=None):
    """A safetensors file of this header: JSON or anything."""
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(words) if length is None else length) + words + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def said_of(text):
    """The metadata of a file of ours."""
    return {"__metadata__": {"fewstep": text}}


PACKED = {
    "a head of 2^60 bytes": packed(b"{}", length=2**60),
    "a head that is deep": packed(b'{"a":' * 200_000),
    "a head that is no JSON": packed(b"{" + b"x" * 10**6),
    "a tensor beyond the file": packed({"a": tensor([4], 0, 16)}, bytes(4)),
    "2^40 values in 16 bytes": packed({"a": tensor([2**20, 2**20], 0, 16)}, bytes(16)),
    "two tensors in one place": packed(
        {"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}, bytes(16)),
    "a negative shape": packed({"a": tensor([-4], 0, 16)}, bytes(16)),
    "an unknown type": packed({"a": tensor([4], 0, 16, "X32")}, bytes(16)),
    "no metadata": packed({"a": tensor([4], 0, 16)}, bytes(16)),
    "deep metadata": packed(said_of("[" * 200_000)),
    "metadata that is a list": packed(said_of("[1]")),
    "metadata of 10^5000": packed(said_of('{"kind": 1%s}' % ("0" * 5000))),
    "a pickle": b"\x80\x04cos\nsystem\nX\x07\x00\x00\x00touch x\x85R.",
    "empty": b"",
    "zeros": bytes(10**6),
}


@pytest.mark.parametrize("case", PACKED)
def test_what_is_no_safetensors_of_ours_is_refused(case, tmp_path):
    path = write(tmp_path, PACKED[case], "a.safetensors")
    one_line_refusal(lambda: read(path), path, "not a teacher in safetensors")


def test_other_files_as_teachers(tmp_path):
    whole = teacher_file(tmp_path).read_bytes()
    parts = {"cut": whole[:-100], "half": whole[: len(whole) // 2], "long": whole + b" "}
    for name, data in parts.items():
        one_line_refusal(lambda: read(write(tmp_path, data, f"{name}.pt")), name)  # noqa: B023
    torch.save({"fewstep": "teacher"}, tmp_path / "old.pt")
    one_line_refusal(lambda: read(str(tmp_path / "old.pt")), "old.pt: not a teacher in safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pkl", "a.json"])
def test_pipes_devices_and_holes_are_refused(name, tmp_path):
    """Not waited for, and not read into memory."""
    example = torch.tensor([80.0, 1.0, 0.0], dtype=torch.float64)
    call = (lambda path: load_schedule(path, example)) if name == "a.json" else read
    os.mkfifo(tmp_path / name)
    os.symlink("/dev/zero", tmp_path / f"zero{name}")
    (tmp_path / f"hole{name}").touch()
    os.truncate(tmp_path / f"hole{name}", 2**31 - 1)
    for file, said in ((name, "not a file"), (f"zero{name}", "not a file"), (f"hole{name}", "")):
        one_line_refusal(lambda: call(str(tmp_path / file)), said, file)  # noqa: B023


@pytest.mark.parametrize("make", [unet.ddpmpp, unet.ncsnpp, unet.adm])
def test_a_claim_is_checked_without_random_draws(make):
    """Else a teacher's file would change the run that reads it."""
    kwargs = dict(img_resolution=8, img_channels=1, model_channels=64, channel_mult=[1])
    kwargs |= dict(num_blocks=1, attn_resolutions=[8], label_dim=3)
    state = {"kwargs": kwargs, "sigma_data": 0.5, "weights": make(**kwargs).state_dict()}
    before = torch.get_rng_state()
    check_network(make, state)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------- JSON and npz


NUMBERS = '{"sigmas": %s, "sigmas_net": [80, 1, 0]}'
JSON = {
    "200,000 deep": ("[" * 200_000, "recursion"),
    "a dict 200,000 deep": ('{"a":' * 200_000, "recursion"),
    "nested numbers": (NUMBERS % ("[" * 400 + "1" + "]" * 400), "too many dimensions"),
    "NaN": (NUMBERS % "[80, NaN, 0]", "strictly decreasing"),
    "1e999": (NUMBERS % "[1e999, 1, 0]", "strictly decreasing"),
    "10^5000": (NUMBERS % f"[{'1' * 5000}, 1, 0]", "digits"),
    "10^300": (NUMBERS % f"[{'1' * 300}, 1, 0]", "has 3 levels from sigma 1.11111e+299"),
    "texts": (NUMBERS % '["80", "1", "0"]', "too many dimensions"),
    "a number": (NUMBERS % "80", "strictly decreasing"),
    "an empty list": (NUMBERS % "[]", "strictly decreasing"),
    "rising": (NUMBERS % "[1, 2, 0]", "strictly decreasing"),
    "400,000 numbers": (NUMBERS % str([1.5] * 400_000), "strictly decreasing"),
    "no JSON": ("{a", "not a schedule.json"),
    "a list": ("[1, 2]", "not a schedule.json"),
    "NaN in sigmas_net": ('{"sigmas": [80, 1, 0], "sigmas_net": [80, NaN, 0]}', "not finite"),
    "lists of lists": (NUMBERS % "[[1], [2, 3]]", "not a schedule.json"),
    "no list of the name": ('{"sigmas": [80, 1, 0]}', "KeyError"),
    "5 MB": (NUMBERS % "[80, 1, 0]" + " " * 5_000_000, "bytes, not 1 to"),
    "no text": ("\udcff\udcfe\x00", "--schedule"),
    "no file": (None, "No such file"),
}


@pytest.mark.parametrize("case", JSON)
def test_a_hostile_schedule_is_refused(case, tmp_path):
    words, said = JSON[case]
    path = tmp_path / "schedule.json"
    if words is not None:
        path.write_bytes(words.encode("utf-8", "surrogateescape"))
    example = torch.tensor([80.0, 1.0, 0.0], dtype=torch.float64)
    one_line_refusal(lambda: load_schedule(path, example), said, str(path))


def header(shape, dtype="<f8"):
    words = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words


def npz(path, packing=zipfile.ZIP_DEFLATED, **entries):
    """An .npz with arrays, or with the bytes of an entry."""
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, value in entries.items():
            if not isinstance(value, bytes):
                buffer = io.BytesIO()
                np.save(buffer, value, allow_pickle=True)
                value = buffer.getvalue()
            archive.writestr(f"{name}.npy", value)
    return path


def moments(size=4, **changes):
    return {"mu": np.zeros(size), "sigma": np.eye(size)} | changes


LOPSIDED = np.eye(4) + np.eye(4, k=1)
NPZ = {
    "a bomb in its head": (moments(sigma=header((2**20, 2**20))), "`mu` and `sigma`"),
    "a real bomb": (moments(sigma=header((2**14, 2**13)) + bytes(2**27)), "`mu` and `sigma`"),
    "fewer values than its head says": (moments(sigma=header((4, 4)) + bytes(8)), "got 8"),
    "a negative shape": (moments(sigma=header((-4, -4)) + bytes(128)), "`mu` and `sigma`"),
    "a head that is code": (moments(sigma=header("__import__('os')")), "`mu` and `sigma`"),
    "objects": (moments(mu=np.array([print] * 4)), "Object arrays cannot"),
    "texts": (moments(mu=np.array(["a"] * 4)), "no numbers"),
    "complex": (moments(mu=np.zeros(4, complex)), "no numbers"),
    "NaN": (moments(mu=np.full(4, np.nan)), "no mean or covariance"),
    "infinite": (moments(sigma=np.full((4, 4), np.inf)), "no mean or covariance"),
    "lopsided": (moments(sigma=LOPSIDED), "no mean or covariance"),
    "another shape": (moments(sigma=np.eye(5)), "moments of 4 features"),
    "a scalar": (moments(mu=np.float64(1)), "features"),
    "no sigma": ({"mu": np.zeros(4)}, "`mu` and `sigma`"),
}


@pytest.mark.parametrize("case", NPZ)
def test_hostile_moments_are_refused(case, tmp_path):
    entries, said = NPZ[case]
    path = npz(tmp_path / "ref.npz", **entries)
    extractor = SimpleNamespace(dim=4, name="some-features")
    one_line_refusal(lambda: load_moments(path, extractor), said, f"--reference {path}")


def test_moments_of_an_unknown_compression_are_refused(tmp_path):
    """LZMA's head may ask for gigabytes."""
    path = npz(tmp_path / "ref.npz", zipfile.ZIP_LZMA, **moments())
    extractor = SimpleNamespace(dim=4, name="some-features")
    one_line_refusal(lambda: load_moments(path, extractor), "unknown compression")


def test_numbers_beyond_a_bound_are_not_unpacked(tmp_path):
    path = npz(tmp_path / "a.npz", mu=np.zeros(1000))
    assert len(read_npz(path, ("mu",), 8200)[0]) == 1000
    with pytest.raises(Refused, match="more than 8,000 bytes"):
        read_npz(path, ("mu",), 8000)


# -------------------------------------------------------------------------------------- images


def png(size=4, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (size, size)).save(file, "png")
    return file.getvalue()


def chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png_of(width, height, more=b""):
    """A PNG that claims a size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", b"x\x9c\x03\x00\x00\x00\x00\x01")


def jpeg_of(scans):
    """1024 pixels wide; the last of its scans is there again and again."""
    file = io.BytesIO()
    Image.new("RGB", (1024, 1024), "gray").save(file, "jpeg", progressive=True)
    head, scan = file.getvalue()[:-2].rsplit(b"\xff\xda", 1)
    return head + (b"\xff\xda" + scan) * scans + b"\xff\xd9"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(HACKED) (w) file closefile\n%%EOF\n"
IMAGES = {
    "1,025 pixels wide": (png_of(1_025, 1_025), "at most 1024 pixels wide"),
    "10,000 pixels wide": (png_of(10_000, 10_000), "at most 1024 pixels wide"),  # PIL would warn
    "30,000 pixels wide": (png_of(30_000, 30_000), "not a readable image"),
    "2^31 pixels wide": (png_of(2**31 - 1, 2**31 - 1), "not a readable image"),
    "no pixels": (png_of(64, 64), "not a readable image"),
    "cut": (png(64)[:-30], "not a readable image"),
    "no image": (b"<html>404</html>", "not a readable image"),
    "a program": (EPS, "cannot identify image file"),
    "a long chunk": (png_of(4, 4, chunk(b"zTXt", bytes(2**26))), "at most 16,777,216 bytes"),
    "100,000 scans": (jpeg_of(100_000), "more scans"),  # 600 of 4096 pixels took 6 seconds
    "empty": (b"", "not a readable image"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", IMAGES)
def test_a_hostile_image_is_refused(case, packed, tmp_path):
    content, said = IMAGES[case]
    source = tmp_path / "images"
    if packed:
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", content)
    else:
        source.mkdir()
        (source / "a.png").write_bytes(content)
    one_line_refusal(lambda: load_dataset("folder", "train", source), "a.png", said)


def test_many_scans_and_black_images_take_little(tmp_path):
    """At most 1024 pixels wide: a JPEG of 600 scans, and 25 small files of black images."""
    (tmp_path / "one.jpg").write_bytes(jpeg_of(600))
    black = png(1024, "RGB")
    for i in range(25):
        (tmp_path / f"{i}.png").write_bytes(black)
    found = guarded(lambda: load_dataset("folder", "train", tmp_path))
    assert not found.error and found.mib < 300, found  # nor killed, after 30 seconds


def test_a_pipe_among_images_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    one_line_refusal(lambda: load_dataset("folder", "train", tmp_path), "not a file")


def zipped(path, entries, packing=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_names_that_lead_out_of_a_zip_lead_nowhere(tmp_path):
    names = ("../out.png", "/tmp/out.png", "a/../../out.png")
    folder = tmp_path / "in"
    folder.mkdir()
    path = zipped(folder / "images.zip", dict.fromkeys(names, png()))
    before = set(tmp_path.rglob("*"))
    assert load_dataset("folder", "train", path).images.shape == (3, 1, 4, 4)
    after = {file for file in tmp_path.rglob("*") if "cache" not in file.parts}
    assert after <= before


def test_a_name_that_would_write_on_the_terminal_is_shown_as_text(tmp_path):
    path = zipped(tmp_path / "images.zip", {"a\n\x1b[2J.png": b"no image"})
    one_line_refusal(lambda: load_dataset("folder", "train", path), "[2J.png is not a readable")


def labelled(words):
    return {"a.png": png(), "dataset.json": words}


ZIPS = {
    "deep": (labelled("[" * 200_000), "dataset.json is not"),
    "60 MB of lists": (labelled("[" + "[]," * 20_000_000), "at most 4,194,409 bytes"),
    "4 MB of lists": (labelled("[" + "[]," * 1_398_000), "dataset.json is not"),
    "a class of 10^9": (labelled('{"labels": [["a.png", 1000000000]]}'), "class numbers must"),
    "a negative class": (labelled('{"labels": [["a.png", -1]]}'), "class numbers must"),
    "an infinite class": (labelled('{"labels": [["a.png", 1e999]]}'), "dataset.json is not"),
    "a class NaN": (labelled('{"labels": [["a.png", NaN]]}'), "dataset.json is not"),
    "labels that are text": (labelled('{"labels": "all"}'), "dataset.json is not"),
    "a list": (labelled("[1]"), "dataset.json is not"),
    "no JSON": (labelled(b"\xff\xff"), "dataset.json is not"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_a_hostile_zip_is_refused(case, tmp_path):
    entries, said = ZIPS[case]
    path = zipped(tmp_path / "images.zip", entries)
    one_line_refusal(lambda: load_dataset("folder", "train", path), str(path), said)


def test_a_damaged_zip_is_refused(tmp_path):
    data = zipped(tmp_path / "images.zip", {"a.png": png(64)}).read_bytes()
    rng = random.Random(0)
    for _ in range(30):
        path = tmp_path / "damaged.zip"
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            load_dataset("folder", "train", path)
        except UsageError as error:
            assert str(error).isprintable()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", png())
    one_line_refusal(lambda: load_dataset("folder", "train", path), "stored or deflated")
