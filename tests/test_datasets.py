"""common/datasets.py, common/machinery/folders.py: pixels, labels, and a resumable order."""

import hashlib
import io
import json
import os
import sys
import threading
import urllib.error
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import UsageError, datasets
from common.datasets import Dataset, Stream, fingerprint, load_dataset, to_float, to_uint8
from common.machinery import folders

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))
import imagenet_to_png  # noqa: E402

from scripts import take_few_of_cifar10, watch, write_cifar10  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache")


def refused(*args, **kwargs):
    """The one line with which load_dataset refuses."""
    with pytest.raises(UsageError) as error:
        load_dataset(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------- digits


def test_digits_are_the_1797_images_of_the_source():
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    assert len(train.images) == len(train.labels) == 1500
    assert len(test.images) == len(test.labels) == 297
    assert (train.resolution, train.channels, train.num_classes) == (8, 1, 10)
    assert (train.split, test.split) == ("train", "test")
    images = torch.cat([train.images, test.images])
    # The first two rows of the first line of the csv.
    levels = torch.tensor([[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]])
    assert torch.equal(images[0, 0, :2].float(), (levels * 255 / 16).round())
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "b41ca9fd335466ee"
    assert set(images.unique().tolist()) == {round(v * 255 / 16) for v in range(17)}


def test_digits_have_their_labels():
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    assert train.labels[:12].tolist() == [*range(10), 0, 1]
    means = [train.images[train.labels == k].double().mean(0) for k in range(10)]
    means = torch.stack(means)  # (10, 1, 8, 8)
    nearest = (test.images[:, None].double() - means).square().sum((2, 3, 4)).argmin(1)
    assert (nearest == test.labels).double().mean() > 0.85


def test_the_channels_are_known_without_loading():
    names = ("digits", "mnist", "cifar10", "imagenet64")
    assert [datasets.shape_of(name, None)[0] for name in names] == [1, 1, 3, 3]


def test_an_unknown_data_set_is_refused():
    assert "--dataset cifar: unknown" in refused("cifar") and "cifar10" in refused("cifar")


# ----------------------------------------------------------------------- bytes and floats


def test_all_bytes_survive_the_way_to_floats_and_back():
    all_bytes = torch.arange(256, dtype=torch.uint8)
    x = to_float(all_bytes)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1 and (x.diff() > 0).all()
    assert torch.equal(to_uint8(x), all_bytes) and torch.equal(to_uint8(x.double()), all_bytes)
    assert to_uint8(torch.tensor([-1.5, 1.5, 0.0])).tolist() == [0, 255, 128]


# --------------------------------------------------------------------- torchvision's sets


def write_mnist(folder):
    """Four idx files: 5 training and 3 test images, labels 9, 8, 7, ...

    Pixel (row 1, column 2) of image i is 10 i.
    """
    folder.mkdir(parents=True)
    for prefix, n in (("train", 5), ("t10k", 3)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 1, 2] = 10 * np.arange(n)
        labels = (9 - np.arange(n)).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{prefix}-{name}-ubyte").write_bytes(head + array.tobytes())


def test_mnist_is_read_where_it_lies(tmp_path, no_network):
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    before = sorted((tmp_path / "data").rglob("*"))
    for split, n in (("train", 5), ("test", 3)):
        data = load_dataset("mnist", split, tmp_path / "data")
        assert data.images.shape == (n, 1, 28, 28)
        assert data.images.dtype == torch.uint8 and data.labels.dtype == torch.int64
        assert data.images[:, 0, 1, 2].tolist() == [10 * i for i in range(n)]
        assert int(data.images.sum()) == sum(range(n)) * 10
        assert data.labels.tolist() == [9 - i for i in range(n)] and data.num_classes == 10
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_cifar10_has_its_channels_first(tmp_path, monkeypatch):
    image = np.arange(3072).reshape(3, 32, 32)
    parts = [(image[None] % 251 + i).astype(np.uint8) for i in (0, 1)]
    write_cifar10(tmp_path, (parts[0], [7]), (parts[1], [8]))
    take_few_of_cifar10(monkeypatch)
    for i, split in enumerate(("train", "test")):
        data = load_dataset("cifar10", split, tmp_path)
        assert np.array_equal(data.images[0].numpy(), image % 251 + i)
        assert data.labels.tolist() == [7 + i]


def test_cifar10_may_be_a_folder_per_class(tmp_path):
    """Its label is the class's place in the alphabet, as in the original."""
    for i, (split, name) in enumerate(product(("train", "test"), ("airplane", "cat", "bird"))):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / split / name / "0.png")
    assert load_dataset("cifar10", "train", tmp_path).images[:, 0, 0, 0].tolist() == [0, 2, 1]
    data = load_dataset("cifar10", "test", tmp_path)
    assert data.images[:, 0, 0, 0].tolist() == [3, 5, 4] and data.labels.tolist() == [0, 1, 2]
    assert datasets.has_test_images("cifar10", tmp_path)
    assert datasets.fingerprint("cifar10", tmp_path) != datasets.fingerprint("cifar10", None) == ""


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)


def test_a_failed_download_says_what_from_where_and_where_to(tmp_path, cache, no_network):
    message, place = refused("mnist"), str(cache / "data" / "MNIST" / "raw")
    source = "https://ossci-datasets.s3.amazonaws.com/mnist/", "train-images-idx3-ubyte.gz"
    for part in ("mnist", "no network", *source, place, "--data-dir"):
        assert part in message
    message = refused("cifar10", data_dir=tmp_path)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert str(tmp_path) in message


def test_a_file_cut_short_is_refused(tmp_path, no_network):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-9])
    assert "no readable copy" in refused("mnist", data_dir=tmp_path)


# ----------------------------------------------------------------------- folders and zips


def pixels(value, channels=3, size=4):
    """An image with `value` in its top left corner, and other values elsewhere."""
    array = np.arange(channels * size * size, dtype=np.uint8).reshape(size, size, channels)
    array[0, 0, 0] = value
    return array


def png(array):
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, "png")
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def corners(data):
    return dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist()))


def test_sub_folders_are_the_classes(tmp_path):
    values = {"dog/deep/a.png": 200, "cat/b.png": 100, "ant/c.png": 50}
    others = {"ant/notes.txt": b"no image", "ant/._c.png": b"a Mac's shadow file"}
    write(tmp_path, {**{name: png(pixels(v)) for name, v in values.items()}, **others})
    data = load_dataset("folder", "train", tmp_path)
    assert corners(data) == {50: 0, 100: 1, 200: 2} and (data.num_classes, data.split) == (3, "all")
    expected = np.stack([pixels(v).transpose(2, 0, 1) for v in (50, 100, 200)])
    assert np.array_equal(data.images.numpy(), expected)  # sorted by name, channels first
    assert torch.equal(load_dataset("folder", "test", tmp_path).images, data.images)


def test_held_out_images_are_at_hand_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "cache_dir", lambda: tmp_path / "cache")
    write(tmp_path / "flat", {"a.png": png(pixels(1))})
    write(tmp_path / "split", {"train/a.png": png(pixels(1)), "val/a.png": png(pixels(2))})
    there = datasets.has_test_images
    assert not there("folder", tmp_path / "split")  # a FID needs two
    write(tmp_path / "split", {"val/b.png": png(pixels(2))})
    assert there("digits", None) and there("folder", tmp_path / "split")
    assert not there("folder", tmp_path / "flat")
    assert not there("mnist", None) and not there("cifar10", None)  # and nothing is downloaded
    (tmp_path / "cache/data/cifar-10-batches-py").mkdir(parents=True)
    assert there("cifar10", None) and not there("cifar10", tmp_path)
    write_mnist(tmp_path / "MNIST/raw")
    assert there("mnist", tmp_path)


def test_a_flat_folder_has_no_labels(tmp_path):
    write(tmp_path, {"a.png": png(pixels(1, channels=1)), "b.png": png(pixels(2, channels=1))})
    data = load_dataset("folder", "train", tmp_path)
    assert corners(data) == {1: 0, 2: 0} and data.num_classes == 0 and data.channels == 1
    assert np.array_equal(data.images[0, 0].numpy(), pixels(1, channels=1)[..., 0])


@pytest.mark.parametrize("name", ["folder", "imagenet64"])
def test_a_zip_of_edm_carries_its_labels(tmp_path, name):
    files = {f"0000{i}/img{i}.png": png(pixels(10 * i)) for i in range(3)}
    labels = [["00000/img0.png", 5], ["00002/img2.png", 0], ["00001/img1.png", 3]]
    for content, expected, classes in (
        ({"labels": labels}, {0: 5, 10: 3, 20: 0}, 6),
        ({"labels": None}, {0: 0, 10: 0, 20: 0}, 0),
    ):
        write_zip(tmp_path / "set.zip", {**files, "dataset.json": json.dumps(content)})
        data = load_dataset(name, "train", tmp_path / "set.zip")
        assert corners(data) == expected and data.num_classes == classes and data.name == name
        assert datasets.shape_of(name, tmp_path / "set.zip") == (
            (3, 64, 64) if name == "imagenet64" else data.images.shape[1:]
        )


CAT, DOG, BIRD = (png(pixels(v)) for v in (10, 20, 30))
BOTH = {"cat/a.png": CAT, "dog/b.png": DOG}
GREY, LARGE, FLAT = png(pixels(2, channels=1)), png(pixels(2, size=6)), png(pixels(1)[:2])
MAC = {"__MACOSX/cat/._a.png": b"", "cat/.DS_Store": b"", "dog/.hidden/copy.png": DOG}
TRAIN = {f"train/{name}": content for name, content in BOTH.items()}
NUMBERED = {f"{k}/{k}.png": png(pixels(k)) for k in range(12)}


@pytest.mark.parametrize("files, parts", [
    ({}, ["no images"]),
    ({"a.png": CAT, "b.png": LARGE, "c.png": DOG}, ["b.png", "(3, 6, 6)", "(3, 4, 4)"]),
    ({"a.png": CAT, "b.png": GREY}, ["b.png", "(1, 4, 4)", "(3, 4, 4)"]),
    ({"a.png": CAT, "b.png": CAT[:40]}, ["b.png", "not a readable image"]),
    ({"a.png": FLAT}, ["a.png", "4x2", "square"]),
    ({**BOTH, "dataset.json": b'{"labels": [["cat/a.png", 1]]}'}, ["dog/b.png", "no label"]),
    ({"a.png": CAT, "dataset.json": b'{"labels": [1, 2]}'}, ["dataset.json"]),
    ({"a.png": CAT, "dataset.json": b"{"}, ["dataset.json"]),
])
def test_a_folder_that_is_no_data_set_is_refused(tmp_path, files, parts):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, files)
    message = refused("folder", "train", folder)
    assert all(part in message for part in ["--data-dir", str(folder), *parts])


LAYOUTS = {  # files, corners of the training and of the test images or None for all, what is said
    "hidden": (
        {**BOTH, ".ipynb_checkpoints/c.png": BIRD, **MAC}, {10: 0, 20: 1}, None,
        "no train split; 2 classes: 0 cat (1), 1 dog (1); 4 skipped (hidden)"),
    "valid": (
        {**TRAIN, "valid/dog/c.png": BIRD}, {10: 0, 20: 1}, {30: 1},
        "train split; 2 classes: 0 cat (1), 1 dog (1)"),
    "val": (
        {**TRAIN, "val/cat/c.png": BIRD, "val/dog/d.png": png(pixels(40))}, {10: 0, 20: 1},
        {30: 0, 40: 1}, "train split; 2 classes"),
    "Train and validation": (
        {"Train/a.png": CAT, "validation/b.png": DOG}, {10: 0}, {20: 0}, "train split; no classes"),
    "test before val": (
        {"train/a.png": CAT, "val/b.png": DOG, "test/c.png": BIRD}, {10: 0}, {30: 0},
        "train split; no classes; not val"),
    "flat test": (
        {**TRAIN, "test/c.png": BIRD}, {10: 0, 20: 1}, {30: 0}, "train split; 2 classes"),
    "enclosed": (
        {f"pets/{n}": c for n, c in BOTH.items()}, {10: 0, 20: 1}, None, "0 cat (1), 1 dog (1)"),
    "enclosed twice hidden": (
        {**{f"pets/{n}": c for n, c in TRAIN.items()}, "pets/test/c.png": BIRD,
         "__MACOSX/pets/._train": b""}, {10: 0, 20: 1}, {30: 0}, "1 skipped (hidden)"),
    "enclosed labels": (
        {"set/a.png": CAT, "set/b.png": DOG,
         "set/dataset.json": b'{"labels": [["a.png", 1], ["b.png", 0]]}'}, {10: 1, 20: 0}, None,
        "2 classes: 0 0 (1), 1 1 (1)"),
    "numbers": (NUMBERED, {k: k for k in range(12)}, None, "9 9 (1), 10 10 (1), 11 11 (1)"),
    "numbers from 1": (
        {"10/a.png": CAT, "9/b.png": DOG}, {10: 1, 20: 0}, None, "0 9 (1), 1 10 (1)"),
    "other endings": (
        {"a.jfif": CAT, "b": DOG, "c.PNG": BIRD, "notes.txt": b"PNG"}, {10: 0, 20: 0, 30: 0}, None,
        "no classes; 1 skipped (no image)"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_is_read_as_it_is_meant_and_what_was_read_is_said(case, packed, tmp_path, capsys):
    files, train, test, said = LAYOUTS[case]
    source = tmp_path / "set"
    (write_zip if packed else write)(source, files)
    data = load_dataset("folder", "train", source)
    (line,) = capsys.readouterr().out.splitlines()
    assert corners(data) == train and f"{len(train)} images of 4x4, " in line and said in line
    assert data.num_classes == (0 if "no classes" in line else len({*train.values()}))
    held_out = load_dataset("folder", "test", source)
    assert corners(held_out) == (test or train) and held_out.split == ("test" if test else "all")
    assert held_out.num_classes == (0 if test == {30: 0} else data.num_classes)  # flat
    load_dataset("folder", "train", source)
    assert "train" not in capsys.readouterr().out.replace("no test", "")  # said once


@pytest.mark.parametrize(
    "files, named",
    [
        ({**TRAIN, "test/cat/c.png": BIRD, "preview.png": BIRD}, ["preview.png", "test, train"]),
        ({**TRAIN, "more/c.png": BIRD}, ["more/c.png", "train"]),
        ({**BOTH, "c.png": BIRD}, ["c.png", "cat, dog"]),
        ({**TRAIN, "train/c.png": BIRD}, ["train/c.png", "cat, dog"]),
    ],
)
def test_a_layout_that_could_mean_two_things_is_refused(tmp_path, files, named):
    write(tmp_path, files)
    message = refused("folder", "train", tmp_path)
    assert all(part in message for part in ["lies beside the folders", *named])


def test_links_are_followed_and_circles_refused(tmp_path):
    write(tmp_path / "elsewhere", BOTH)
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert corners(load_dataset("folder", "train", tmp_path / "set")) == {10: 0, 20: 1}
    (tmp_path / "elsewhere" / "dog" / "again").symlink_to(tmp_path / "elsewhere" / "dog")
    assert "leads in a circle" in refused("folder", "train", tmp_path / "set")
    (tmp_path / "elsewhere" / "dog" / "again").unlink()
    (tmp_path / "elsewhere" / "dog" / "up").symlink_to(tmp_path / "set")  # by way of another link
    assert "leads in a circle" in refused("folder", "train", tmp_path / "set")


def test_names_that_are_no_text_are_read(tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/\xff"
    for name in (b"a", b"b"):
        os.makedirs(folder + b"/\xe4" + name)
        with open(folder + b"/\xe4" + name + b"/\xfc.png", "wb") as file:
            file.write(CAT)
    monkeypatch.setattr(folders, "IN_MEMORY", 1)
    assert load_dataset("folder", "train", os.fsdecode(folder)).labels.tolist() == [0, 1]
    assert fingerprint("folder", os.fsdecode(folder), exact=True)


def saved(image, kind="png", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def test_images_are_turned_scaled_and_put_on_white(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (4, 4)).astype(np.uint8)
    wide = np.minimum(grey.astype(int) * 257 + 100, 2**16 - 1).astype(np.uint16)  # rounds to grey
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    colour = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    alpha = np.full((4, 4, 1), 255, np.uint8)
    alpha[0], alpha[1] = 0, 51
    on_white = (colour * (alpha / 255) + 255 - alpha).round()
    palette = Image.fromarray(grey // 64).convert("P")
    palette.putpalette([9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0])
    cases = {
        "turned": (saved(Image.fromarray(colour), exif=exif), np.rot90(colour, -1)),
        "16 bits": (saved(Image.fromarray(wide)), grey[..., None]),
        "rgba": (saved(Image.fromarray(np.concatenate([colour, alpha], 2))), on_white),
        "la": (saved(Image.fromarray(colour[..., 0]).convert("LA")), colour[..., :1]),
        "two levels": (saved(Image.fromarray(grey > 99)), 255 * (grey > 99)[..., None]),
        "palette": (saved(palette), [[[9 - 3 * k, 8 - 3 * k, 7 - 3 * k] if k < 3 else [0, 0, 0]
                                      for k in row] for row in grey // 64]),
    }
    for name, (content, expected) in cases.items():
        write(tmp_path / name, {"a.png": content})
        images = load_dataset("folder", "train", tmp_path / name).images
        found = images[0].permute(1, 2, 0).double().numpy()
        np.testing.assert_allclose(found, expected, atol=1 if name == "rgba" else 0, err_msg=name)
    write(tmp_path / "float", {"a.tif": saved(Image.fromarray(grey / np.float32(7)), "tiff")})
    assert "not a readable image (floating" in refused("folder", "train", tmp_path / "float")


def test_the_shares_of_classes_are_those_of_the_training_images(tmp_path):
    files = {f"train/{'cat' if k else 'dog'}/{k}.png": CAT for k in range(10)}
    write(tmp_path, {**files, "test/dog/a.png": DOG})
    assert datasets.class_shares("folder", tmp_path).tolist() == [0.9, 0.1]
    assert datasets.class_shares("digits", None) is None


def test_a_folder_must_be_given_and_exist(tmp_path):
    assert "--data-dir: name a folder" in refused("imagenet64")
    assert "neither a folder nor a zip" in refused("folder", data_dir=tmp_path / "none")
    (tmp_path / "a.zip").write_text("no zip")
    assert "neither a folder nor a zip" in refused("folder", data_dir=tmp_path / "a.zip")


def test_fingerprints_tell_folders_apart(tmp_path, monkeypatch):
    write(tmp_path, {"one/a.png": png(pixels(1)), "two/a.png": png(pixels(1))})
    first = fingerprint("folder", tmp_path / "one")
    assert first != fingerprint("folder", tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    assert first == fingerprint("folder", "one")  # however it is written
    write(tmp_path, {"one/b.png": png(pixels(1))})
    assert first != fingerprint("folder", tmp_path / "one")
    assert fingerprint("mnist", tmp_path / "one") == ""


# ------------------------------------------------------------------------------- ImageNet


def imagenet(rows, k=4):
    """Pixels (rows, 3, k, k) and classes: 0, 999, any others."""
    rng = np.random.default_rng(rows)
    pixels = rng.integers(0, 256, (rows, 3, k, k), np.uint8)
    return pixels, [0, 999, *rng.integers(0, 1000, rows - 2).tolist()]


def write_source(tmp_path, kind):
    """23 images as PNGs, in the layout of EDM's dataset_tool."""
    pixels, labels = imagenet(23)
    files = {}
    for i, image in enumerate(pixels):
        files[f"00000/img{i:08d}.png"] = png(image.transpose(1, 2, 0))
    files["dataset.json"] = json.dumps({"labels": list(zip(files, labels))}).encode()
    (write if kind == "folder" else write_zip)(tmp_path / "set", files)
    return tmp_path / "set"


@pytest.fixture(params=["in memory", "mapped"])
def large(request, monkeypatch):
    """Whether what follows counts as a large source."""
    if request.param == "mapped":
        monkeypatch.setattr(folders, "IN_MEMORY", 1)
    return request.param == "mapped"


@pytest.fixture
def mapped(monkeypatch):
    monkeypatch.setattr(folders, "IN_MEMORY", 1)


def is_imagenet(data, rows=23):
    pixels, labels = imagenet(rows)
    return (
        np.array_equal(data.images.numpy(), pixels)
        and data.labels.tolist() == labels
        and data.num_classes == 1000
        and data.images.dtype == torch.uint8
        and data.labels.dtype == torch.int64
    )


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_every_source_gives_the_same_pixels_and_labels(tmp_path, kind, large, recwarn):
    source = write_source(tmp_path, kind)
    for _ in range(2):  # unpacked, and already there
        for split in ("train", "test"):
            data = load_dataset("imagenet64", split, source)
            assert is_imagenet(data) and data.ahead == large and data.split == "all"
    assert datasets.shape_of("folder", source) == (3, 4, 4) and not recwarn.list
    assert datasets.is_edms("imagenet64", source)


def test_downsampled_imagenet_becomes_a_folder_of_the_usual_classes(tmp_path):
    """The files number the classes otherwise: the usual number is the rank of the WordNet id."""
    order = np.random.default_rng(7).permutation(1000)  # [k - 1]: usual number of class k
    lines = [f"n{7 * place + 1440764:08d} {k} a_kind_of_cat" for k, place in enumerate(order, 1)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join([*lines[500:], *lines[:500]]) + "\n")
    images = np.random.default_rng(1).integers(0, 256, (1005, 3, 4, 4), np.uint8)
    numbers = np.array([*range(1, 1001), 1000, 1, 7, 7, 3])
    for name, part in (("train_data_batch_1", slice(600)), ("train_data_batch_2", slice(600, 1001)),
                       ("val_data", slice(1001, 1005))):
        rows = images[part].reshape(-1, 48)
        np.savez(tmp_path / f"{name}.npz", data=rows, labels=numbers[part])
    imagenet_to_png.convert(tmp_path, tmp_path / "out")
    for split, part in (("train", slice(1001)), ("test", slice(1001, 1005))):
        data = load_dataset("imagenet64", split, tmp_path / "out")
        assert data.split == split and data.num_classes == 1000
        found = sorted(zip(data.labels.tolist(), data.images.numpy().reshape(-1, 48).tolist()))
        expected = zip(order[numbers[part] - 1].tolist(), images[part].reshape(-1, 48).tolist())
        assert found == sorted(expected)
    assert not datasets.is_edms("imagenet64", tmp_path / "out")


def test_a_part_of_the_images_is_of_all_classes():
    images = torch.arange(103)
    assert datasets.evenly(images, 1000) is not None
    assert torch.equal(datasets.evenly(images, 103), images)
    part = datasets.evenly(images, 50)
    assert 33 < len(part) <= 50 and part[0] == 0 and part[-1] >= 99
    assert part.diff().unique().tolist() == [3]


# -------------------------------------------------------------------------- unpacked once


def unpacked(cache):
    return sorted(file.name.split("-", 2)[2] for file in (cache / "data").glob("*-*"))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_large_source_is_decoded_once(tmp_path, kind, mapped, monkeypatch, cache):
    source, calls = write_source(tmp_path, kind), watch(monkeypatch, folders.Folder, "read")
    load_dataset("imagenet64", "train", source)
    read = [name for _, name, *_ in calls]
    assert len(read) == 24 and len({*read}) == 23  # the first image also for its size
    for split in ("train", "test"):
        assert is_imagenet(load_dataset("imagenet64", split, source))
    assert {name for _, name, *_ in calls[24:]} == {read[0]} and unpacked(cache) == ["all.pixels"]


def test_a_small_source_leaves_nothing_in_the_cache(tmp_path, cache):
    load_dataset("imagenet64", "train", write_source(tmp_path, "zip"))
    assert not cache.exists()


@pytest.mark.parametrize("first", ["train", "test"])
def test_the_splits_do_not_depend_on_what_was_unpacked_first(tmp_path, mapped, first):
    write(tmp_path / "set", {"train/cat/a.png": png(pixels(1)), "train/dog/a.png": png(pixels(2))})
    load_dataset("folder", first, tmp_path / "set")
    for split, own in (("train", "train"), ("test", "all")):
        data = load_dataset("folder", split, tmp_path / "set")
        assert data.split == own and corners(data) == {1: 0, 2: 1} and data.num_classes == 2


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_changed_source_is_unpacked_again(tmp_path, kind, mapped, cache):
    source, seven = write_source(tmp_path, kind), png(np.full((4, 4, 3), 7, np.uint8))
    load_dataset("imagenet64", "train", source)
    file = source / "00000" / "img00000004.png" if kind == "folder" else source
    time = os.stat(file).st_mtime_ns
    if kind == "folder":
        file.write_bytes(seven)
    else:
        with zipfile.ZipFile(file) as old:
            names = old.namelist()
            files = {n: seven if n.endswith("00004.png") else old.read(n) for n in names}
        write_zip(file, files)
    os.utime(file, ns=(time + 10**6, time + 10**6))
    data = load_dataset("imagenet64", "train", source)
    assert not is_imagenet(data) and (data.images[4] == 7).all() and len(data.images) == 23
    assert len(unpacked(cache)) == 1  # the 15.7 GB of before are gone


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_fingerprint_sees_sizes_and_names_and_an_exact_one_times(tmp_path, kind):
    """Copied, perhaps: classifier and teacher stay. Resized in place: they do not."""
    source = write_source(tmp_path, kind)
    file = source / "00000/img00000004.png" if kind == "folder" else source
    both = lambda: [fingerprint("imagenet64", source, exact) for exact in (False, True)]
    time, seen = os.stat(file).st_mtime_ns, [both()]
    (tmp_path / "notes.txt").write_text("beside it")
    assert both() == seen[0]
    os.utime(file, ns=(time, time + 1000))
    seen.append(both())
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]
    if kind == "folder":
        file.write_bytes(png(pixels(200, size=6)))
        os.utime(file, ns=(time, time + 1000))
        seen.append(both())
        (source / "notes.txt").write_text("no part of it")
        assert both() == seen[-1]
        (source / "dataset.json").unlink()
        seen.append(both())
        file.rename(file.with_name("img.png"))
        seen.append(both())
    assert len({exact for _, exact in seen}) == len({short for short, _ in seen}) + 1 == len(seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_an_interrupted_unpacking_leaves_nothing_and_is_repeated(
    tmp_path, mapped, monkeypatch, cache, error
):
    source, original = write_source(tmp_path, "folder"), folders.Folder.read
    rest = iter(range(14))

    def stops(*arguments):
        if next(rest, None) is None:
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(folders.Folder, "read", stops)
        load_dataset("imagenet64", "train", source)
    assert unpacked(cache) == []
    place = next((cache / "data").glob("*.lock")).stem
    (cache / "data" / f"{place}-0123-all.pixels.1.part").write_text("of a process that was killed")
    assert is_imagenet(load_dataset("imagenet64", "train", source))
    assert unpacked(cache) == ["all.pixels"]


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_an_unpacked_set_that_is_not_whole_is_made_again(tmp_path, mapped, cache, damage):
    source = write_source(tmp_path, "folder")
    load_dataset("imagenet64", "train", source)
    (file,) = cache.glob("data/*-all.pixels")
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[:-30])
    assert is_imagenet(load_dataset("imagenet64", "train", source))
    assert file.read_bytes() == whole


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, mapped, cache):
    resource = pytest.importorskip("resource")
    source = write_source(tmp_path, "zip")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # 23 images of 48 bytes are more than 1000 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        message = refused("imagenet64", "train", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in message and "all.pixels" in message and unpacked(cache) == []


# --------------------------------------------------------------------------------- Stream


def numbered(n):
    """n images of 1x1x2 pixels: (i, 255 - i), label i."""
    i = torch.arange(n, dtype=torch.uint8)
    return Dataset("numbered", torch.stack([i, 255 - i], 1)[:, None, None, :], i.long(), n, "train")


def test_every_epoch_visits_each_image_once_in_a_new_order():
    data, seen = numbered(23), []
    stream = Stream(data, 5, seed=0)
    while len(seen) < 4 * 23:
        x0, labels = stream.next()
        assert torch.equal(x0, to_float(data.images[labels]))  # images under their own labels
        seen += labels.tolist()
    epochs = [seen[23 * e : 23 * (e + 1)] for e in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and list(range(23)) not in epochs
    other = Stream(data, 23, seed=1).next()[1].tolist()
    assert other != epochs[0]
    assert Stream(data, 23, seed=0).next()[1].tolist() == epochs[0]  # whatever the batch size


@pytest.mark.parametrize("n", [23, 6])  # 6: the global batch is larger than the data set
def test_ranks_share_out_the_stream_of_one(n):
    one = Stream(numbered(n), 8, seed=3)
    ranks = [Stream(numbered(n), 8, seed=3, ranks=(r, 2)) for r in range(2)]
    for _ in range(9):
        parts = [stream.next()[1] for stream in ranks]
        assert [len(part) for part in parts] == [4, 4]
        assert torch.equal(one.next()[1], torch.cat(parts))


def test_the_default_are_the_ranks_of_this_process(monkeypatch):
    monkeypatch.setattr(datasets, "rank_and_world", lambda: (1, 2))
    stream, expected = Stream(numbered(23), 8, 3), Stream(numbered(23), 8, 3, ranks=(1, 2))
    assert same(stream.next(), expected.next())
    assert len(Stream(numbered(23), 7, 3, ranks=(0, 1)).next()[1]) == 7
    with pytest.raises(UsageError, match="^--batch-size 7: must be a multiple of the 2 ranks$"):
        Stream(numbered(23), 7, 3)


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_a_resumed_stream_goes_on_bitwise(rank, world):
    data = load_dataset("digits")
    stream = Stream(data, 100 * world, seed=1, flip=True, ranks=(rank, world))
    for _ in range(9):
        stream.next()
    state = stream.state_dict()
    assert state == {"position": 900 * world}
    resumed = Stream(data, 100 * world, seed=1, flip=True, ranks=(rank, world))
    resumed.load_state_dict(state)
    for _ in range(20):
        (x, y), (x2, y2) = stream.next(), resumed.next()
        assert torch.equal(x, x2) and torch.equal(y, y2)
    resumed.load_state_dict(state)  # back again, from a later epoch
    assert not torch.equal(resumed.next()[0], x)


def test_half_of_the_images_are_mirrored_left_to_right():
    data = load_dataset("digits")
    plain, flipping = Stream(data, 1500, seed=0), Stream(data, 1500, seed=0, flip=True)
    flips = []
    for _ in range(2):
        (x, y), (x2, y2) = plain.next(), flipping.next()
        assert torch.equal(y, y2)
        same, mirrored = ((x2 == z).flatten(1).all(1) for z in (x, x.flip(-1)))
        assert (same | mirrored).all()
        assert 0.45 < mirrored[~(same & mirrored)].double().mean() < 0.55
        flips.append(dict(zip((x.flatten(1).sum(1) * 1e4).long().tolist(), mirrored.tolist())))
    assert flips[0] != flips[1]  # drawn anew in every epoch


def far(data):
    """The same set, as if its images were too large for the device."""
    return Dataset(data.name, data.images, data.labels, data.num_classes, data.split, ahead=True)


def same(batch, other):
    return all(torch.equal(a, b) for a, b in zip(batch, other))


@pytest.mark.parametrize("rank, world", [(0, 1), (0, 2), (1, 2)])
def test_a_stream_that_fetches_ahead_gives_the_same_batches(tmp_path, mapped, rank, world):
    source = write_source(tmp_path, "zip")
    large = load_dataset("imagenet64", "train", source)
    small = Dataset("copy", large.images.clone(), large.labels, large.num_classes, "train")
    batch_size, ranks = 5 * world, (rank, world)
    stream, plain = (Stream(data, batch_size, 1, True, ranks) for data in (large, small))
    assert stream.thread and not plain.thread
    for i in range(30):  # several epochs of 23
        assert same(stream.next(), plain.next())
        assert stream.state_dict() == plain.state_dict() == {"position": batch_size * (i + 1)}
    state = {"position": 7 * batch_size}
    resumed = Stream(large, batch_size, 1, True, ranks)
    for other in (stream, plain, resumed):
        other.load_state_dict(state)
    for _ in range(9):
        batch = plain.next()
        assert same(stream.next(), batch) and same(resumed.next(), batch)
    stream.position = plain.position = 0  # as cud.py does
    assert same(stream.next(), plain.next()) and stream.position == batch_size


def test_batches_are_fetched_before_they_are_asked_for():
    data = numbered(23)
    stream, plain = Stream(far(data), 5, seed=0), Stream(data, 5, seed=0)
    calls, go = [], threading.Event()

    def fetch(position):
        calls.append((position, threading.current_thread() is threading.main_thread()))
        assert position == 0 or go.wait(10)  # the first does not wait for the next one
        return Stream._fetch(stream, position)

    stream._fetch = fetch
    assert same(stream.next(), plain.next()) and stream.state_dict() == {"position": 5}
    go.set()
    stream.thread.submit(int).result()  # comes when all before it is done
    assert calls == [(0, False), (5, False)] and stream.position == 5
    for _ in range(3):
        assert same(stream.next(), plain.next())
    stream.thread.submit(int).result()
    assert [position for position, _ in calls] == [0, 5, 10, 15, 20]  # each once only, one ahead
    stream.position = plain.position = 0
    assert same(stream.next(), plain.next()) and stream.position == 5


def test_rows_are_read_in_the_order_of_the_file():
    read, data = [], numbered(23)

    class Images:
        shape, device = data.images.shape, data.images.device
        __len__ = lambda self: 23
        __getitem__ = lambda self, rows: read.append(rows.tolist()) or data.images[rows]

    stream = Stream(Dataset("read", Images(), data.labels, 23, "train", ahead=True), 11, seed=0)
    assert same(stream.next(), Stream(data, 11, seed=0).next()) and read[0] == sorted(read[0])


def test_one_image_is_no_training_set():
    with pytest.raises(UsageError, match="one image"):
        Stream(numbered(1), 4, seed=0)


def test_what_goes_wrong_while_fetching_is_raised_by_next():
    data = numbered(23)
    stream, plain = Stream(far(data), 5, seed=0), Stream(data, 5, seed=0)
    assert same(stream.next(), plain.next())

    def fails(position):
        raise OSError("the disk is gone")

    stream._fetch, stream.coming = fails, (None, None)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            stream.next()
    assert stream.position == 5
    del stream._fetch
    assert same(stream.next(), plain.next())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_does_not_fit_on_the_gpu_stays_where_it_is(monkeypatch):
    data = load_dataset("digits", device="cuda")
    assert data.images.is_cuda and data.labels.is_cuda and not data.ahead
    streams = [Stream(load_dataset("digits"), 100, 0, True), Stream(data, 100, 0, True)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * data.images.nbytes, 10**9))
    large = load_dataset("digits", device="cuda")
    assert not large.images.is_cuda and large.labels.is_cuda
    assert large.ahead and large.device.type == "cuda"
    streams.append(Stream(large, 100, 0, True))
    for _ in range(40):
        batches = [stream.next() for stream in streams]
        assert all(part.is_cuda for part in (*batches[1], *batches[2]))
        assert same(batches[1], batches[2])
        assert same(batches[0], [part.cpu() for part in batches[2]])
