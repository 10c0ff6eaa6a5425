"""common/datasets.py: the right pixels under the right labels, in an order that one integer resumes."""
import gzip
import hashlib
import io
import json
import pickle
import threading
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets
from common.datasets import Dataset, Stream, fingerprint, load_dataset, to_float, to_uint8
from common.training import UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(*args, **kwargs):
    """The one line with which load_dataset refuses."""
    with pytest.raises(UsageError) as error:
        load_dataset(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------- digits

def test_digits_are_the_1797_images_of_the_source():
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    assert len(train.images) == len(train.labels) == 1500 and len(test.images) == len(test.labels) == 297
    assert (train.resolution, train.channels, train.num_classes, train.split, test.split) == (8, 1, 10, "train", "test")
    images = torch.cat([train.images, test.images])
    levels = torch.tensor([[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]])  # the first two rows of the first line of the csv
    assert torch.equal(images[0, 0, :2].float(), (levels * 255 / 16).round())
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "b41ca9fd335466ee"
    assert set(images.unique().tolist()) == {round(v * 255 / 16) for v in range(17)}


def test_digits_have_their_labels():
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    assert train.labels[:12].tolist() == [*range(10), 0, 1]
    means = torch.stack([train.images[train.labels == k].double().mean(0) for k in range(10)])  # (10, 1, 8, 8)
    nearest = (test.images[:, None].double() - means).square().sum((2, 3, 4)).argmin(1)
    assert (nearest == test.labels).double().mean() > 0.85


def test_digits_name_their_source():
    with np.load(datasets.ASSETS / "digits.npz") as file:
        text = " ".join(file["source"])
    assert all(word in text for word in ("Alpaydin", "Kaynak", "10.24432/C50P49", "CC BY 4.0"))


def test_the_channels_are_known_without_loading():
    assert [datasets.channels_of(name, None) for name in ("digits", "mnist", "cifar10")] == [1, 1, 3]


def test_an_unknown_data_set_is_refused():
    assert "--dataset cifar: unknown" in refused("cifar") and "cifar10" in refused("cifar")


# ---------------------------------------------------------------------------------------------------------- bytes and floats

def test_all_bytes_survive_the_way_to_floats_and_back():
    all_bytes = torch.arange(256, dtype=torch.uint8)
    x = to_float(all_bytes)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1 and (x.diff() > 0).all()
    assert torch.equal(to_uint8(x), all_bytes) and torch.equal(to_uint8(x.double()), all_bytes)
    assert to_uint8(torch.tensor([-1.5, 1.5, 0.0])).tolist() == [0, 255, 128]


# ------------------------------------------------------------------------------------------------------- torchvision's sets

def write_mnist(folder, packed):
    """Four idx files: 5 training and 3 test images, pixel (row 1, column 2) of image i = 10 i, labels 9, 8, 7, ..."""
    folder.mkdir(parents=True)
    for prefix, n in (("train", 5), ("t10k", 3)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 1, 2] = 10 * np.arange(n)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", (9 - np.arange(n)).astype(np.uint8))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_where_it_lies(tmp_path, packed, no_network):
    write_mnist(tmp_path / "data" / "MNIST" / "raw", packed)
    before = sorted((tmp_path / "data").rglob("*"))
    for split, n in (("train", 5), ("test", 3)):
        data = load_dataset("mnist", split, tmp_path / "data")
        assert data.images.shape == (n, 1, 28, 28) and data.images.dtype == torch.uint8 and data.labels.dtype == torch.int64
        assert data.images[:, 0, 1, 2].tolist() == [10 * i for i in range(n)] and int(data.images.sum()) == sum(range(n)) * 10
        assert data.labels.tolist() == [9 - i for i in range(n)] and data.num_classes == 10
    assert sorted((tmp_path / "data").rglob("*")) == before  # nothing was unpacked into the user's folder


def test_cifar10_has_its_channels_first(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    image = np.arange(3072).reshape(3, 32, 32)
    for name, i in (("data_batch_1", 0), ("test_batch", 1)):
        (folder / name).write_bytes(pickle.dumps({"data": (image.reshape(1, -1) % 251 + i).astype(np.uint8), "labels": [7 + i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    for i, split in enumerate(("train", "test")):
        data = load_dataset("cifar10", split, tmp_path)
        assert np.array_equal(data.images[0].numpy(), image % 251 + i) and data.labels.tolist() == [7 + i]


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)


def test_a_failed_download_says_what_from_where_and_where_to(tmp_path, cache, no_network):
    message = refused("mnist")
    for part in ("mnist", "no network", "train-images-idx3-ubyte.gz", "https://ossci-datasets.s3.amazonaws.com/mnist/",
                 str(cache / "data" / "MNIST" / "raw"), "--data-dir"):
        assert part in message
    message = refused("cifar10", data_dir=tmp_path)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message and str(tmp_path) in message


def test_a_file_cut_short_is_refused(tmp_path, no_network):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder, packed=False)
    (folder / "train-images-idx3-ubyte").write_bytes((folder / "train-images-idx3-ubyte").read_bytes()[:-9])
    assert "no readable copy" in refused("mnist", data_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file" / "cache"))
    assert "FEWSTEP_CACHE" in refused("mnist") and str(tmp_path / "file") in refused("mnist")


def test_a_lock_lets_one_in_at_a_time(tmp_path):
    events = []

    def other():
        with datasets.locked(tmp_path / "x"):
            events.append("other")
    with datasets.locked(tmp_path / "x"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        events.append("first")
    thread.join(10)
    assert events == ["first", "other"]


# ------------------------------------------------------------------------------------------------------------ folders and zips

def pixels(value, channels=3, size=4):
    """An image with `value` in its top left corner, other levels elsewhere, other channels above."""
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


def corners(data):
    return dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist()))


def test_sub_folders_are_the_classes(tmp_path):
    write(tmp_path, {"dog/deep/a.png": png(pixels(200)), "cat/b.png": png(pixels(100)), "ant/c.png": png(pixels(50)),
                     "ant/notes.txt": b"no image", "ant/._c.png": b"a Mac's shadow file"})
    data = load_dataset("folder", "train", tmp_path)
    assert corners(data) == {50: 0, 100: 1, 200: 2} and (data.num_classes, data.split) == (3, "all")
    expected = np.stack([pixels(v).transpose(2, 0, 1) for v in (50, 100, 200)])
    assert np.array_equal(data.images.numpy(), expected)  # sorted by name, channels first
    assert torch.equal(load_dataset("folder", "test", tmp_path).images, data.images)


def test_train_and_test_are_the_splits_and_share_the_classes(tmp_path):
    write(tmp_path, {"train/cat/a.png": png(pixels(1)), "train/dog/a.png": png(pixels(2)), "test/dog/a.png": png(pixels(3))})
    train, test = (load_dataset("folder", split, tmp_path) for split in ("train", "test"))
    assert corners(train) == {1: 0, 2: 1} and corners(test) == {3: 1}
    assert (train.split, test.split, train.num_classes, test.num_classes) == ("train", "test", 2, 2)


def test_a_flat_folder_has_no_labels(tmp_path):
    write(tmp_path, {"a.png": png(pixels(1, channels=1)), "b.png": png(pixels(2, channels=1))})
    data = load_dataset("folder", "train", tmp_path)
    assert corners(data) == {1: 0, 2: 0} and data.num_classes == 0 and data.channels == 1
    assert np.array_equal(data.images[0, 0].numpy(), pixels(1, channels=1)[..., 0])


@pytest.mark.parametrize("name", ["folder", "imagenet64"])
def test_a_zip_of_edm_carries_its_labels(tmp_path, name):
    files = {f"0000{i}/img{i}.png": png(pixels(10 * i)) for i in range(3)}
    labels = [["00000/img0.png", 5], ["00002/img2.png", 0], ["00001/img1.png", 3]]
    for content, expected, classes in (({"labels": labels}, {0: 5, 10: 3, 20: 0}, 6), ({"labels": None}, {0: 0, 10: 0, 20: 0}, 0)):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for file, data in {**files, "dataset.json": json.dumps(content)}.items():
                archive.writestr(file, data)
        data = load_dataset(name, "train", tmp_path / "set.zip")
        assert corners(data) == expected and data.num_classes == classes and data.name == name
        assert datasets.channels_of(name, tmp_path / "set.zip") == 3


@pytest.mark.parametrize("files, parts", [
    ({}, ["no images"]),
    ({"a.png": png(pixels(1)), "b.png": png(pixels(2, size=6)), "c.png": png(pixels(2, size=8))}, ["b.png", "(3, 6, 6)", "(3, 4, 4)"]),
    ({"a.png": png(pixels(1)), "b.png": png(pixels(2, channels=1))}, ["b.png", "(1, 4, 4)", "(3, 4, 4)"]),
    ({"a.png": png(pixels(1)), "b.png": png(pixels(1))[:40]}, ["b.png", "not a readable image"]),
    ({"a.png": png(pixels(1)[:2])}, ["a.png", "4x2", "square"]),
    ({"a.png": png(pixels(1, channels=4))}, ["a.png", "RGBA"]),
    ({"a/a.png": png(pixels(1)), "b/b.png": png(pixels(1)), "dataset.json": b'{"labels": [["a/a.png", 1]]}'}, ["b/b.png", "no label"]),
    ({"a.png": png(pixels(1)), "dataset.json": b'{"labels": [1, 2]}'}, ["dataset.json"]),
    ({"a.png": png(pixels(1)), "dataset.json": b"{"}, ["dataset.json"]),
])
def test_a_folder_that_is_no_data_set_is_refused(tmp_path, files, parts):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, files)
    message = refused("folder", "train", folder)
    assert all(part in message for part in ["--data-dir", str(folder), *parts])


def test_a_folder_must_be_given_and_exist(tmp_path):
    assert "--dataset imagenet64: give --data-dir" in refused("imagenet64")
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
    assert first != fingerprint("folder", tmp_path / "one") and fingerprint("mnist", tmp_path / "one") == ""


# ---------------------------------------------------------------------------------------------------------------------- Stream

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
    epochs = [seen[23 * e:23 * (e + 1)] for e in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and list(range(23)) not in epochs
    other = Stream(data, 23, seed=1).next()[1].tolist()
    assert other != epochs[0] and Stream(data, 23, seed=0).next()[1].tolist() == epochs[0]  # whatever the batch size


@pytest.mark.parametrize("n", [23, 6])  # 6: the global batch is larger than the data set
def test_ranks_share_out_the_stream_of_one(n):
    one, ranks = Stream(numbered(n), 8, seed=3), [Stream(numbered(n), 4, seed=3, rank=r, world=2) for r in range(2)]
    for _ in range(9):
        assert torch.equal(one.next()[1], torch.cat([stream.next()[1] for stream in ranks]))


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_a_resumed_stream_goes_on_bitwise(rank, world):
    data = load_dataset("digits")
    stream = Stream(data, 100, seed=1, flip=True, rank=rank, world=world)
    for _ in range(9):
        stream.next()
    state = stream.state_dict()
    assert state == {"position": 900 * world}
    resumed = Stream(data, 100, seed=1, flip=True, rank=rank, world=world)
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
        assert (same | mirrored).all() and 0.45 < mirrored[~(same & mirrored)].double().mean() < 0.55
        flips.append(dict(zip((x.flatten(1).sum(1) * 1e4).long().tolist(), mirrored.tolist())))
    assert flips[0] != flips[1]  # drawn anew in every epoch
