"""Images of a disk in memory, or mapped; downsampled ImageNet.

A small source is read into memory. A large one is decoded once, into one file of pixels in
the cache, and mapped from there, as long as its `stamp` is the same.
"""
import contextlib
import functools
import hashlib
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from common import UsageError
from common.machinery.files import atomic_write, cache_dir, locked, read_npz
from common.machinery.folders import Source, list_images
from common.machinery.foreign import Refused, one_line, read_file
from common.machinery.pickles import Machine, Record, call_of

BATCHES = {  # the files of downsampled ImageNet
    "train": [f"train_data_batch_{i}" for i in range(1, 11)],
    "test": ["val_data"],
}
IN_MEMORY = 2**30  # bytes of pixels from which on a source is unpacked into the cache and mapped


# ----------------------------------------------------------------- what lies on the disk


def list_batches(path):
    """{name: file} of the batches of downsampled ImageNet that lie in a folder."""
    files = {n: (path / n, path / f"{n}.npz") for n in BATCHES["train"] + BATCHES["test"]}
    return {n: both[both[1].is_file()] for n, both in files.items() if any(map(Path.is_file, both))}


def is_downsampled(data_dir):
    """Whether `data_dir` holds the batches of downsampled ImageNet."""
    return data_dir is not None and bool(list_batches(Path(data_dir)))


def stamp(path, times=True):
    """16 hex digits of the names, sizes and (with `times`) times of all files of a source."""
    if path.is_file():
        files = [path]
    elif batches := list_batches(path):
        files = [*batches.values(), path / "map_clsloc.txt"]
    else:
        root, names, *_ = list_images(path)
        files = [f"{path}/{root}{name}" for name in [*names, "dataset.json"]]
    digest = hashlib.sha256(b"2")  # of what is read of them: another number for other pixels
    for file in filter(os.path.exists, files):
        s = os.stat(file)
        digest.update(os.fsencode(f"{file}\n{s.st_size} {s.st_mtime_ns * times}\n"))
    return digest.hexdigest()[:16]


@functools.lru_cache
def count(path, stamp):
    """Number of images; counted once as long as `stamp` holds."""
    return 1_281_167 if list_batches(path) else len(list_images(path)[1])


# ------------------------------------------------------------------- in memory or mapped


def load_source(path, split, read):
    """One split of a source: images (N, C, H, W) uint8, then labels, number of classes, split and
    what was found in words.

    `read(path, split)` gives a `Source`. The images are an array, or a map of a file in the cache
    from IN_MEMORY bytes on.
    """
    place = cache_dir() / "data" / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    stem = f"{place}-{stamp(path)}"
    if found := _mapped(stem, split):
        return found
    source = read(path, split)
    if source.size < IN_MEMORY:
        images = np.concatenate(list(source.pixels()))
        return images, source.labels, source.num_classes, source.split, source.about
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
    stem = f"{stem}-{source.split}"
    atomic_write(f"{stem}.pixels", lambda file: file.writelines(source.pixels()))
    index = {k: getattr(source, k) for k in ("labels", "shape", "num_classes", "serves", "about")}
    atomic_write(f"{stem}.npz", lambda file: np.savez(file, **index))


def _mapped(stem, split):
    """As `load_source`, from the cache and without reading a pixel; None if it is not there."""
    for own in (split, "all"):
        with contextlib.suppress(Exception):  # missing or damaged: it will be made again
            with np.load(f"{stem}-{own}.npz") as index:
                if split in index["serves"]:
                    labels, num_classes = index["labels"], int(index["num_classes"])
                    shape = (len(labels), *index["shape"].tolist())
                    images = np.memmap(f"{stem}-{own}.pixels", np.uint8, "r", shape=shape)
                    return images, labels, num_classes, own, str(index["about"])
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
    for name in BATCHES[split]:
        if name not in there:
            raise UsageError(
                f"--data-dir {path}: {name} (or {name}.npz) is missing, "
                f"which the {split} split needs"
            )
    files = [there[name] for name in BATCHES[split]]
    class_of = _class_numbers(path / "map_clsloc.txt")

    def parts():
        for file in files:
            pixels, numbers = read_batch(file)
            yield file.name, pixels, class_of[numbers - 1].tolist()

    size = sum(file.stat().st_size for file in files)  # hardly more than the pixels
    return Source(path, size, parts(), 1000, split, [split], f"{split} split, 1000 classes")


def _class_numbers(path):
    """Class 1 ... 1000 of downsampled ImageNet -> the usual 0 ... 999, EDM's too: (1000,).

    The usual number is the rank of the class's WordNet id. Lines: "n02119789 1 kit_fox".
    """
    try:
        words = [line.split() for line in read_file(path, 2**20).decode().splitlines()]
        id_of = {int(number): wordnet for wordnet, number, *_ in words}
        if sorted(id_of) != list(range(1, 1001)) or len({*id_of.values()}) != 1000:
            raise ValueError("not the classes 1 ... 1000")
    except ValueError as error:
        reason = one_line(error)
        raise UsageError(
            f"--data-dir {path.parent}: {path.name} is missing or unreadable ({reason}); it names "
            "the classes and comes with github.com/PatrykChrabaszcz/Imagenet32_Scripts"
        ) from None
    return np.argsort(np.argsort([id_of[k] for k in range(1, 1001)]))


def read_batch(file):
    """Pixels (N, 3, k, k) and labels 1 ... 1000 (N,) of one file, a pickle or an npz.

    Nothing in the file is executed. Raises UsageError.
    """
    try:
        if file.suffix == ".npz":
            most = max(2**28, 8 * file.stat().st_size)
            pixels, labels = read_npz(file, ("data", "labels"), most)
        else:
            pixels, labels = _pickled(file)
        k = math.isqrt(pixels.shape[-1] // 3)
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


def _pickled(file):
    data = read_file(file, 2**33)  # with 128,116 labels: of numpy, they take 8 opcodes each
    batch = Machine(data, ALLOWED, "batch of ImageNet", most=1_200_000).load()
    if type(batch) is not dict or "data" not in batch or "labels" not in batch:
        raise Refused("it is no dict with data and labels")
    labels = batch["labels"]
    if type(labels) is list:
        labels = np.array([k if type(k) is int else _array(k).item() for k in labels])
    return _array(batch["data"]), labels if isinstance(labels, np.ndarray) else _array(labels)


def _array(record):
    """numpy's array or number, of a Record: (version, shape, dtype, Fortran's order, bytes)."""
    if type(record) is not Record or not record.name.endswith(("._reconstruct", ".scalar")):
        raise Refused(f"a {type(record).__name__} in place of an array of numbers")
    if record.name.endswith(".scalar"):
        (kind, data), shape, fortran = record.args, (), False
    else:
        _, shape, kind, fortran, data = record.state
    code, order = call_of(kind, "numpy.dtype", 1)[0], kind.state[1]
    if code not in CODES or order not in ("<", ">", "|"):
        raise Refused("an array of an unknown type or byte order")
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise Refused("an array without a shape")
    data = data.encode("latin1") if isinstance(data, str) else data  # from Python 2
    numbers = np.frombuffer(data, np.dtype(code).newbyteorder(order))
    return numbers.reshape(shape, order="F" if fortran is True else "C")


CODES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "b1")
NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since version 2
ALLOWED = {f"{module}.{name}" for module in NUMPY for name in ("_reconstruct", "scalar")}
ALLOWED |= {"numpy.dtype", "numpy.ndarray"}
