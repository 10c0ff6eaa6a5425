"""Large data: folders and zips of images, downsampled ImageNet.

A small source is read into memory. A large one is decoded once, into one file of pixels in
the cache, and mapped from there, as long as its `stamp` is the same.
"""
import contextlib
import functools
import hashlib
import math
import os
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import UsageError
from common.machinery.files import BAR, PACKINGS, atomic_write, cache_dir, locked, read_npz
from common.machinery.pickles import (
    Machine,
    Record,
    Refused,
    call_of,
    file_size,
    mapped_file,
    one_line,
)

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm",
}
BATCHES = {  # the files of downsampled ImageNet
    "train": [f"train_data_batch_{i}" for i in range(1, 11)],
    "test": ["val_data"],
}
IN_MEMORY = 2**30  # bytes of pixels from which on a source is unpacked into the cache and mapped


@dataclass
class Source:
    """One split of the images on a disk. Reading `pixels` fills `labels` and `shape`."""

    path: Path
    size: int           # bytes of all pixels, about
    parts: Iterable     # (file name, pixels (n, C, H, W) uint8, n labels), read one by one
    num_classes: int
    split: str          # "train" | "test" | "all"
    serves: list        # the splits that these images are: both for "all"
    labels: list = field(default_factory=list)
    shape: tuple = ()   # (C, H, W)

    def pixels(self):
        """Yield the pixels (n, C, H, W) of all parts. Raises UsageError for mixed shapes."""
        style = {"unit": "B", "unit_scale": True, "disable": self.size < 2**24, **BAR}
        first = None
        with tqdm(total=self.size, desc=f"reading {self.path}", **style) as bar:
            for name, pixels, labels in self.parts:
                shape = pixels.shape[1:]
                if first is None:
                    first, self.shape = name, shape
                if shape != self.shape:
                    raise UsageError(
                        f"--data-dir {self.path}: {one_line(name)} is {shape} (channels, height, "
                        f"width), but {one_line(first)} is {self.shape}; all must be the same: "
                        "resize them, convert grey ones to RGB"
                    )
                self.labels.extend(labels)
                yield np.ascontiguousarray(pixels)
                bar.update(pixels.nbytes)


# ----------------------------------------------------------------- what lies on the disk


def find_source(name, data_dir):
    """The absolute path of the folder or zip that `--data-dir` names. Raises UsageError."""
    if data_dir is None:
        raise UsageError(
            f"--dataset {name}: give --data-dir, a folder of images (a sub-folder per class), a "
            "zip of EDM's dataset_tool or the folder with the batches of downsampled ImageNet"
        )
    path = Path(data_dir).resolve()
    if not (path.is_dir() or path.is_file() and zipfile.is_zipfile(path)):
        raise UsageError(f"--data-dir {path}: neither a folder nor a zip file")
    return path


def list_images(path):
    """The images of a folder or a zip, and a function that opens one of its files by name.

    Names are sorted, relative to `path`, with "/". Nothing of a zip is written to the disk, so a
    name like "../a.png" leads nowhere. opener(name, most) raises Refused for more than `most`
    bytes. Raises UsageError where there are none.
    """
    if path.is_dir():
        names = (
            os.path.join(folder, file)[len(str(path)) + 1:].replace(os.sep, "/")
            for folder, _, files in os.walk(path)
            for file in files
        )
        opener = functools.partial(_open_file, path)
    else:
        try:
            archive = zipfile.ZipFile(path)
        except Exception as error:  # a damaged one raises anything
            raise UsageError(f"--data-dir {path}: a damaged zip ({one_line(error)})") from None
        names, opener = archive.namelist(), functools.partial(_open_packed, archive)
    images = sorted(name for name in names if _is_image(name))
    if not images:
        raise UsageError(f"--data-dir {path}: no images in it ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return images, opener


def _open_file(path, name, most):
    if file_size(path / name) > most:
        raise Refused(f"not a file of at most {most:,} bytes")
    return open(path / name, "rb")


def _open_packed(archive, name, most):
    entry = archive.getinfo(name)
    if entry.compress_type not in PACKINGS or entry.file_size > most:
        raise Refused(f"not a stored or deflated file of at most {most:,} bytes")
    return archive.open(entry)


def _is_image(name):
    hidden = os.path.basename(name).startswith(".")
    return not hidden and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_batches(path):
    """{name: file} of the batches of downsampled ImageNet that lie in a folder."""
    found = {}
    for name in BATCHES["train"] + BATCHES["test"]:
        for file in (path / name, path / f"{name}.npz"):
            if file.is_file():
                found[name] = file
    return found


def is_downsampled(data_dir):
    """Whether `data_dir` holds the batches of downsampled ImageNet."""
    return data_dir is not None and bool(list_batches(Path(data_dir)))


def stamp(path):
    """16 hex digits of the names, sizes and times of all files of a source."""
    if path.is_file():
        files = [path]
    elif batches := list_batches(path):
        files = [*batches.values(), path / "map_clsloc.txt"]
    else:
        files = [f"{path}/{name}" for name in [*list_images(path)[0], "dataset.json"]]
    digest = hashlib.sha256()
    for file in files:
        if os.path.exists(file):
            s = os.stat(file)
            digest.update(f"{file}\n{s.st_size} {s.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


@functools.lru_cache
def count(path, stamp):
    """Number of images, or bytes of training batches; counted once as long as `stamp` holds."""
    if batches := list_batches(path):
        return sum(file.stat().st_size for n, file in batches.items() if n in BATCHES["train"])
    return len(list_images(path)[0])


# ------------------------------------------------------------------- in memory or mapped


def load_source(path, split, read):
    """One split of a source: images (N, C, H, W) uint8, labels, number of classes, split.

    `read(path, split)` gives a `Source`. The images are an array, or a map of a file in the cache
    from IN_MEMORY bytes on.
    """
    place = cache_dir() / "data" / hashlib.sha256(str(path).encode()).hexdigest()[:16]
    stem = f"{place}-{stamp(path)}"
    if found := _mapped(stem, split):
        return found
    source = read(path, split)
    if source.size < IN_MEMORY:
        images = np.concatenate(list(source.pixels()))
        return images, source.labels, source.num_classes, source.split
    with locked(place):
        if not (found := _mapped(stem, split)):  # no other process has unpacked it meanwhile
            _unpack(source, place, stem)
            found = _mapped(stem, split)
    return found


def _unpack(source, place, stem):
    """Write pixels and index of a source into the cache; delete what an older stamp left there."""
    for old in place.parent.glob(f"{place.name}-*"):
        if old.name.endswith(".part") or not str(old).startswith(stem):
            old.unlink()
    # Not written through a map: there a full disk would be a SIGBUS. The index comes last.
    write_pixels = lambda file: file.writelines(source.pixels())
    atomic_write(f"{stem}-{source.split}.pixels", write_pixels)
    index = {
        "labels": source.labels,
        "shape": source.shape,
        "num_classes": source.num_classes,
        "serves": source.serves,
    }
    atomic_write(f"{stem}-{source.split}.npz", lambda file: np.savez(file, **index))


def _mapped(stem, split):
    """As `load_source`, from the cache and without reading a pixel; None if it is not there."""
    for own in (split, "all"):
        with contextlib.suppress(Exception):  # missing or damaged: it will be made again
            with np.load(f"{stem}-{own}.npz") as index:
                if split in index["serves"]:
                    labels, num_classes = index["labels"], int(index["num_classes"])
                    shape = (len(labels), *index["shape"].tolist())
                    images = np.memmap(f"{stem}-{own}.pixels", np.uint8, "r", shape=shape)
                    return images, labels, num_classes, own
    return None


def as_tensor(images):
    """An array or a read-only map as a tensor. A private map would be charged as memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about read-only arrays: nobody writes there
        return torch.as_tensor(images)


# ------------------------------------------------------------------ downsampled ImageNet


def read_downsampled(path, split):
    """The `Source` of a split of downsampled ImageNet (Chrabaszcz et al. 2017, arXiv:1707.08819).

    Raises UsageError where a batch or the list of classes is missing.
    """
    there = list_batches(path)
    if missing := [name for name in BATCHES[split] if name not in there]:
        name = missing[0]
        raise UsageError(
            f"--data-dir {path}: {name} (or {name}.npz) is missing, which the {split} split needs"
        )
    files = [there[name] for name in BATCHES[split]]
    class_of = _class_numbers(path / "map_clsloc.txt")

    def parts():
        for file in files:
            pixels, numbers = read_batch(file)
            yield file.name, pixels, class_of[numbers - 1].tolist()

    size = sum(file.stat().st_size for file in files)  # hardly more than the pixels
    return Source(path, size, parts(), 1000, split, [split])


def _class_numbers(path):
    """Class 1 ... 1000 of downsampled ImageNet -> the usual 0 ... 999, EDM's too: (1000,).

    The usual number is the rank of the class's WordNet id. Lines: "n02119789 1 kit_fox".
    """
    try:
        text = bytes(mapped_file(path, 2**20)).decode()
        words = [line.split() for line in text.splitlines()]
        classes = sorted((int(number), wordnet) for wordnet, number, *_ in words)
        numbers, ids = [n for n, _ in classes], [wordnet for _, wordnet in classes]
        if numbers != list(range(1, 1001)) or len(set(ids)) != 1000:
            raise ValueError("not the classes 1 ... 1000")
    except ValueError as error:
        reason = one_line(error)
        raise UsageError(
            f"--data-dir {path.parent}: {path.name} is missing or unreadable ({reason}); it names "
            "the classes and comes with github.com/PatrykChrabaszcz/Imagenet32_Scripts"
        ) from None
    return np.argsort(np.argsort(ids))


def read_batch(file):
    """Pixels (N, 3, k, k) and labels 1 ... 1000 (N,) of one file, a pickle or an npz.

    Nothing in the file is executed. Raises UsageError.
    """
    try:
        pixels, labels = (_npz if file.suffix == ".npz" else _pickled)(file)
        labels, k = np.asarray(labels), math.isqrt(pixels.shape[-1] // 3)
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or not k or pixels.shape[1] != 3 * k * k:
            found = f"{pixels.dtype} of shape {pixels.shape}"
            raise ValueError(f"its pixels are {found}, not uint8 (N, 3 k k)")
        fits = labels.shape == (len(pixels),) and labels.dtype.kind in "iu"
        if not fits or labels.min() < 1 or labels.max() > 1000:
            raise ValueError(f"its labels are not {len(pixels)} numbers from 1 to 1000")
    except Exception as error:  # a foreign or damaged file raises anything
        raise UsageError(
            f"--data-dir {file}: not a readable batch of downsampled ImageNet ({one_line(error)}); "
            "nothing in it was run"
        ) from None
    return pixels.reshape(-1, 3, k, k), labels


def _npz(file):
    return read_npz(file, ("data", "labels"), max(2**28, 8 * file.stat().st_size))


def _pickled(file):
    data = mapped_file(file, 2**33)  # with 128,116 labels: of numpy, they take 8 opcodes each
    batch = Machine(data, ALLOWED, "batch of ImageNet", most=1_200_000).load()
    if type(batch) is not dict or "data" not in batch or "labels" not in batch:
        raise Refused("it is no dict with data and labels")
    labels = batch["labels"]
    if type(labels) is list:
        labels = [_number(label) for label in labels]
    elif type(labels) is Record:
        labels = _array(labels)
    else:
        raise Refused(f"its labels are a {type(labels).__name__}")
    return _array(batch["data"]), labels


def _numbers(kind, data):
    """Numbers of a numpy.dtype record in the bytes `data`."""
    code = call_of(kind, "numpy.dtype", 1)[0]
    if type(code) is not str or code not in CODES or type(kind.state) is not tuple:
        raise Refused("an array of an unknown type")
    if isinstance(data, str):  # from Python 2
        data = data.encode("latin1")
    order = kind.state[1]
    if type(order) is not str or order not in ("<", ">", "|"):
        raise Refused("an array of an unknown byte order")
    return np.frombuffer(data, np.dtype(code).newbyteorder(order))


def _array(record):
    """An array: a Record whose state is (version, shape, dtype, Fortran's order, bytes)."""
    if type(record) is not Record or not record.name.endswith("._reconstruct"):
        raise Refused(f"a {type(record).__name__} in place of an array")
    _, shape, kind, fortran, data = record.state
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise Refused("an array without a shape")
    return _numbers(kind, data).reshape(shape, order="F" if fortran is True else "C")


def _number(label):
    """A label: an int, or numpy's."""
    if type(label) is Record and label.name.endswith(".scalar"):
        label = _numbers(*label.args)[0].item()
    if type(label) is not int:
        raise Refused("its labels are not numbers from 1 to 1000")
    return label


CODES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "b1")
ALLOWED = {"numpy.dtype", "numpy.ndarray"}
for _numpy in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since version 2
    ALLOWED |= {f"{_numpy}._reconstruct", f"{_numpy}.scalar"}
