"""Images on a disk: folders and zips of them, downsampled ImageNet.

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
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import UsageError
from common.machinery.files import BAR, PACKINGS, atomic_write, cache_dir, locked, read_npz
from common.machinery.pickles import (
    Machine, Record, Refused, call_of, file_size, mapped_file, one_line,
)

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # else
# Splits that a folder can be named after; of several for testing the first one is taken.
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
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
    about: str = ""     # what was found, in words
    labels: list = field(default_factory=list)
    shape: tuple = ()   # (C, H, W)

    def pixels(self):
        """Yield the pixels (n, C, H, W) of all parts. Raises UsageError for mixed shapes."""
        style = {"unit": "B", "unit_scale": True, "disable": self.size < 2**24, **BAR}
        first = None
        with tqdm(total=self.size, desc=f"reading {one_line(self.path)}", **style) as bar:
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
    """The images of a folder or a zip: root, names, opener, what else lies there {kind: count}.

    Names are sorted, relative to the root, with "/"; the root is "" or one folder that encloses
    all. A file is an image by its ending, or by its first bytes; hidden files and folders are
    none. Symbolic links are followed. Nothing of a zip is written to the disk, so a name like
    "../a.png" leads nowhere. opener(name, most) raises Refused for more than `most` bytes. Raises
    UsageError where there are no images.
    """
    if path.is_dir():
        names, open_file = _walk(path), functools.partial(_open_file, path)
    else:
        try:
            archive = zipfile.ZipFile(path)
        except Exception as error:  # a damaged one raises anything
            raise UsageError(f"--data-dir {path}: a damaged zip ({one_line(error)})") from None
        names, open_file = archive.namelist(), functools.partial(_open_packed, archive)
    images, others, tops = [], Counter(), set()
    for name in names:
        *folders, file = name.split("/")
        if any(part == "__MACOSX" or part.startswith(".") and part != ".."
               for part in (*folders, file)):
            others["hidden"] += 1
        elif file == "dataset.json" or file and _is_image(name, open_file):
            tops.add(folders[0] if folders else None)
            images += [name] if file != "dataset.json" else []
        elif file:
            others["no image"] += 1
    if not images:
        raise UsageError(f"--data-dir {path}: no images in it ({' '.join(ENDINGS)})")
    root, (top, *more) = "", tops
    if top and not more and top.lower() not in SPLITS["train"] + SPLITS["test"]:
        root = f"{top}/"
    opener = lambda name, most: open_file(root + name, most)
    return root, sorted(name[len(root):] for name in images), opener, others


def _walk(path):
    """The names of all files below a folder. Raises UsageError for links that go in circles."""
    for folder, folders, files in os.walk(path, followlinks=True):
        for link in filter(os.path.islink, (os.path.join(folder, name) for name in folders)):
            above = [folder[:i] for i, c in enumerate(folder) if c == os.sep and i] + [folder]
            if os.path.realpath(link) in map(os.path.realpath, above):
                raise UsageError(f"--data-dir {path}: the link {one_line(link)} leads in a circle")
        for file in files:
            yield os.path.join(folder, file)[len(str(path)) + 1:].replace(os.sep, "/")


def _open_file(path, name, most):
    if file_size(path / name) > most:
        raise Refused(f"not a file of at most {most:,} bytes")
    return open(path / name, "rb")


def _open_packed(archive, name, most):
    entry = archive.getinfo(name)
    if entry.compress_type not in PACKINGS or entry.file_size > most:
        raise Refused(f"not a stored or deflated file of at most {most:,} bytes")
    return archive.open(entry)


def _is_image(name, open_file):
    if name.lower().endswith(ENDINGS):
        return True
    with contextlib.suppress(Exception), open_file(name, 2**26) as file:
        return file.read(4).startswith(BEGINNINGS)
    return False


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
        words = [line.split() for line in bytes(mapped_file(path, 2**20)).decode().splitlines()]
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
    data = mapped_file(file, 2**33)  # with 128,116 labels: of numpy, they take 8 opcodes each
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
