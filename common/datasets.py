"""Data sets, whole and as uint8: `digits` (in the repository), `mnist`, `cifar10`, `imagenet64`, `folder`.

`load_dataset` gives a `Dataset`, a `Stream` over it gives shuffled float batches for ever, and resumes from one integer. What is
large is decoded once, into the cache, and mapped from there; what does not fit on the device is fetched a few batches ahead.
"""
import contextlib
import fcntl
import functools
import gzip
import hashlib
import json
import math
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.edm_pickle import Unpickler, encode
from common.training import DATASETS, UsageError, atomic_write, cache_dir

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet64": (3, 64, 64)}
ASSETS = Path(__file__).parent / "assets"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
BATCHES = {"train": [f"train_data_batch_{i}" for i in range(1, 11)], "test": ["val_data"]}  # the files of downsampled ImageNet
IN_MEMORY = 2**30  # bytes of pixels from which on a source is unpacked into the cache and mapped
AHEAD = 2          # batches that a Stream fetches before they are asked for


@dataclass
class Dataset:
    """A whole data set. `device` is where its batches go; its images lie there too unless they are too large."""
    name: str
    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,) int64, on `device`, all 0 where there are none
    num_classes: int      # 0: no labels
    split: str            # "train" | "test" | "all": "all" where the source has no test part and both splits are the same images
    ahead: bool = False   # the images lie in a file or do not fit on `device`: a Stream fetches its batches ahead

    @property
    def device(self):
        return self.labels.device

    @property
    def resolution(self):
        return self.images.shape[-1]

    @property
    def channels(self):
        return self.images.shape[1]


def load_dataset(name, split="train", data_dir=None, device="cpu"):
    """Read one split ("train" | "test") of one of DATASETS onto `device`; on a GPU, only what fits into half of its free memory.

    `data_dir`, for `folder` and `imagenet64`: a folder of images, a zip of EDM's dataset_tool, or a folder with the batches (pickles or
    npz) of downsampled ImageNet (Chrabaszcz et al. 2017, arXiv:1707.08819) and its list of classes, map_clsloc.txt. These are whole
    images resized by a box filter, EDM's are centre crops: a FID against the reference of the other means nothing. For `mnist` and
    `cifar10`: where the original files lie or are downloaded to (the cache by default). Raises UsageError where the data is missing,
    unreadable or of mixed shapes.
    """
    device = torch.device(device)
    if name == "digits":
        images, labels, num_classes = *_digits(split), 10
    elif name in ("mnist", "cifar10"):
        images, labels, num_classes = *_torchvision(name, split, data_dir), 10
    elif name in ("folder", "imagenet64"):
        images, labels, num_classes, split = _from_disk(_place(name, data_dir), split)
    else:
        raise UsageError(f"--dataset {name}: unknown, choose one of {', '.join(DATASETS)}")
    mapped = isinstance(images, np.memmap)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a read-only map: nobody writes there (a private one would be charged as if it were memory)
        images = torch.as_tensor(images)
    if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    ahead = images.device.type == "cpu" and (mapped or device.type != "cpu")
    return Dataset(name, images, torch.as_tensor(labels).long().to(device), num_classes, split, ahead)


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Images in [-1, 1] (values outside are clipped) -> uint8, rounding as EDM does; inverse of `to_float`."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


@contextlib.contextmanager
def locked(path):
    """One process at a time makes the file `path` of the cache; the others (ranks, or a second run) wait, then find it made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(f"{path}.lock", "w")
    except OSError as error:
        raise UsageError(f"the cache {path.parent} cannot be written ({error.strerror}); set FEWSTEP_CACHE to another folder") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        for part in path.parent.glob(f"{path.name}.*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
        yield


# ------------------------------------------------------------------------------------------------------------------ the sources

def _digits(split):
    """The first 1,500 of the 1,797 images to train; the last 297 to test: other people's hands (the file goes writer by writer)."""
    with np.load(ASSETS / "digits.npz") as file:
        part = slice(0, 1500) if split == "train" else slice(1500, None)
        return file["images"][part, None], file["labels"][part]


def _torchvision(name, split, data_dir):
    """MNIST or CIFAR-10 by torchvision, downloaded with its checksums unless it lies in `data_dir` (MNIST: still packed will do)."""
    from torchvision import datasets as tv
    root, train = Path(data_dir or cache_dir() / "data"), split == "train"
    if name == "mnist":
        source, where, files, place = tv.MNIST, tv.MNIST.mirrors, [file for file, _ in tv.MNIST.resources], root / "MNIST" / "raw"
    else:
        source, where, files, place = tv.CIFAR10, [tv.CIFAR10.url], [tv.CIFAR10.filename], root
    with locked(cache_dir() / "data" / name):
        try:
            try:
                data = source(root, train)
            except RuntimeError:  # not there unpacked
                if name == "mnist" and data_dir and all((place / file).exists() for file in files):
                    images, labels = (gzip.open(place / file).read() for file in (files[:2] if train else files[2:]))
                    # idx files: a header of 16 (images) or 8 bytes (labels), then the bytes themselves
                    return np.frombuffer(images, np.uint8)[16:].reshape(-1, 1, 28, 28).copy(), np.frombuffer(labels, np.uint8)[8:].copy()
                data = source(root, train, download=True)
        except Exception as error:  # torchvision passes on whatever urllib, gzip, tarfile and its own parser raise
            raise UsageError(f"--dataset {name}: no readable copy in {place} and no download ({' '.join(str(error).split())}); fetch by "
                             f"hand {' '.join(files)} from {' or '.join(where)} and put it into {place} (or name its place by --data-dir)"
                             ) from None
    images = np.asarray(data.data)  # MNIST: (N, H, W), CIFAR-10: (N, H, W, C)
    return images[:, None] if name == "mnist" else images.transpose(0, 3, 1, 2).copy(), data.targets


def _place(name, data_dir):
    """The folder or zip that `data_dir` names."""
    if data_dir is None:
        raise UsageError(f"--dataset {name}: give --data-dir, a folder of images (a sub-folder per class), a zip of EDM's dataset_tool "
                         "or the folder with the batches of downsampled ImageNet")
    path = Path(data_dir).resolve()
    if not (path.is_dir() or zipfile.is_zipfile(path)):
        raise UsageError(f"--data-dir {path}: neither a folder nor a zip file")
    return path


def _list_images(path):
    """Sorted names of the images in a folder or a zip (relative, with '/'), and a function that opens a file of it by name."""
    if path.is_dir():
        names = (os.path.join(folder, file)[len(str(path)) + 1:] for folder, _, files in os.walk(path) for file in files)
        opener = lambda file: open(path / file, "rb")
    else:
        archive = zipfile.ZipFile(path)
        names, opener = archive.namelist(), archive.open
    images = sorted(n for n in names if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(n).startswith("."))
    if not images:
        raise UsageError(f"--data-dir {path}: no images in it ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return images, opener


def _list_batches(path):
    """{name: file} of downsampled ImageNet, of those that are there."""
    names = [n for split in BATCHES.values() for n in split]
    return {n: file for n in names for file in (path / n, path / f"{n}.npz") if file.is_file()}


def _stamp(path):
    """16 hex digits of the names, sizes and times of all files that a source consists of."""
    batches = [] if path.is_file() else list(_list_batches(path).values())
    if batches:
        files = [*batches, path / "map_clsloc.txt"]
    else:
        files = [path] if path.is_file() else [f"{path}/{n}" for n in [*_list_images(path)[0], "dataset.json"]]
    stats = ((file, os.stat(file)) for file in files if os.path.exists(file))
    return hashlib.sha256("".join(f"{file}\n{s.st_size} {s.st_mtime_ns}\n" for file, s in stats).encode()).hexdigest()[:16]


@functools.lru_cache
def _count(path, stamp):
    """How many images (or bytes of batches to train on) a source has; looked up once as long as `stamp` holds."""
    if batches := _list_batches(path):
        return sum(file.stat().st_size for n, file in batches.items() if n in BATCHES["train"])
    return len(_list_images(path)[0])


@functools.lru_cache
def _shape(path, stamp):
    """The shape of the first image."""
    if batches := _list_batches(path):
        return _read_batch(next(iter(batches.values())))[0].shape[1:]
    names, opener = _list_images(path)
    return _read_image(path, names[0], opener).shape


def fingerprint(name, data_dir, exact=False):
    """"" for a data set that its name identifies; for a `folder`, or an `imagenet64`, "-" and 8 hex digits of its place and image count.

    `exact`: and 16 more of the sizes and times of all files.
    """
    if name not in ("folder", "imagenet64") or (name == "imagenet64" and data_dir is None):
        return ""
    path = _place(name, data_dir)
    stamp = _stamp(path)
    return "-" + hashlib.sha256(f"{path} {_count(path, stamp)}".encode()).hexdigest()[:8] + (f"-{stamp}" if exact else "")


def shape_of(name, data_dir):
    """(C, H, W) of one image, from the name or, for a `folder`, from its first image: nothing is loaded or downloaded."""
    if name != "folder":
        return SHAPES[name]
    path = _place(name, data_dir)
    return _shape(path, _stamp(path))


def is_downsampled(data_dir):
    """Whether `data_dir` holds the batches of downsampled ImageNet."""
    return data_dir is not None and bool(_list_batches(Path(data_dir)))


def evenly(images, n):
    """At most n of the images, evenly from all: folders lie class by class."""
    return images[:: max(1, -(-len(images) // n))]


def _from_disk(path, split):
    """Images (N, C, H, W), labels, number of classes and split of a source; a large one is unpacked into the cache at its first use."""
    place = cache_dir() / "data" / hashlib.sha256(str(path).encode()).hexdigest()[:16]
    stem = f"{place}-{_stamp(path)}"
    if found := _mapped(stem, split):
        return found
    size, parts, num_classes, own, serves = (_batches if _list_batches(path) else _folder)(path, split)
    first, labels = None, []

    def pixels():
        nonlocal first
        with tqdm(total=size, desc=f"reading {path}", unit="B", unit_scale=True, disable=size < 2**24, dynamic_ncols=True,
                  mininterval=0.5) as bar:
            for name, images, their_labels in parts:
                first = first or (name, images.shape[1:])
                if images.shape[1:] != first[1]:
                    raise UsageError(f"--data-dir {path}: {name} is {images.shape[1:]} (channels, height, width), but {first[0]} is "
                                     f"{first[1]}; all must be the same")
                labels.extend(their_labels)
                yield np.ascontiguousarray(images)
                bar.update(images.nbytes)

    if size < IN_MEMORY:
        return np.concatenate(list(pixels())), labels, num_classes, own
    with locked(place):
        if not (found := _mapped(stem, split)):  # no other process has unpacked it meanwhile
            for old in place.parent.glob(f"{place.name}-*"):
                if old.name.endswith(".part") or not str(old).startswith(stem):  # of a killed process, or of the source as it was
                    old.unlink()
            # written one after the other, not through a map: there a full disk would be a SIGBUS; the index comes last, when all is well
            atomic_write(f"{stem}-{own}.pixels", lambda file: file.writelines(pixels()))
            atomic_write(f"{stem}-{own}.npz", lambda file: np.savez(file, labels=labels, shape=first[1], num_classes=num_classes,
                                                                    serves=serves))
            found = _mapped(stem, split)
    return found


def _mapped(stem, split):
    """As `_from_disk`, from the cache and without reading any pixel; None if it is not there."""
    for own in (split, "all"):
        with contextlib.suppress(Exception):  # missing, or damaged in any way: it will be made again
            with np.load(f"{stem}-{own}.npz") as file:
                if split in file["serves"]:
                    shape = (len(file["labels"]), *file["shape"].tolist())
                    return np.memmap(f"{stem}-{own}.pixels", np.uint8, "r", shape=shape), file["labels"], int(file["num_classes"]), own
    return None


def _folder(path, split):
    """A folder or zip of images: bytes of pixels, (name, pixels, labels) of each image, number of classes, split, the splits it serves.

    Labels: `dataset.json` ({"labels": [[file, class], ...] or null}, as EDM writes it) or else the first-level sub-folder.
    If `train` and `test` or `val` are the first level, they are the splits; a split that has no folder is all the images.
    """
    names, opener = _list_images(path)
    tops = {n.split("/")[0] for n in names}
    own_parts = {"test" if top == "val" else top: top for top in sorted(tops)} if tops <= {"train", "test", "val"} else {}
    below = {n: n.split("/", 1)[1] if own_parts else n for n in names}  # the name below the level of the splits
    try:
        with opener("dataset.json") as file:
            label_of = {n: int(label) for n, label in json.load(file)["labels"] or []}
        classes = range(max(label_of.values(), default=-1) + 1)
    except (FileNotFoundError, KeyError):  # no such file, or none in the zip
        classes = sorted({b.split("/")[0] if "/" in b else "" for b in below.values()})
        classes = [] if len(classes) < 2 or "" in classes else classes
        number = {c: i for i, c in enumerate(classes)}
        label_of = {n: number[b.split("/")[0]] for n, b in below.items()} if classes else {}
    except (ValueError, TypeError) as error:
        raise UsageError(f'--data-dir {path}: dataset.json is not {{"labels": [[file, class number], ...]}} ({error})') from None
    if classes and (unknown := [n for n in names if n not in label_of]):
        raise UsageError(f"--data-dir {path}: {unknown[0]} has no label in dataset.json")
    if split in own_parts:
        names, serves = [n for n in names if n.startswith(own_parts[split] + "/")], [split]
    else:
        split, serves = "all", sorted({"train", "test"} - own_parts.keys())
    parts = ((n, _read_image(path, n, opener)[None], [label_of.get(n, 0)]) for n in names)
    return len(names) * _read_image(path, names[0], opener).nbytes, parts, len(classes), split, serves


def _read_image(path, name, opener):
    """One square grey or RGB image -> (C, H, W) uint8."""
    from PIL import Image
    try:
        with opener(name) as file, Image.open(file) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # PIL's decoders raise many kinds
        raise UsageError(f"--data-dir {path}: {name} is not a readable image ({error})") from None
    if mode not in ("L", "RGB") or pixels.shape[0] != pixels.shape[1]:
        raise UsageError(f"--data-dir {path}: {name} is {pixels.shape[1]}x{pixels.shape[0]} of PIL mode {mode}; "
                         "images must be square and of mode L or RGB")
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------------- downsampled ImageNet

class _Inert:
    """A dtype or an array of a pickle: what it was saved with and nothing more (numpy's own __setstate__ believes what it is told)."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


def _numbers(dtype, data):
    data = data.encode("latin1") if isinstance(data, str) else data  # str: by Python 2
    return np.frombuffer(data, np.dtype(dtype.arguments[0]).newbyteorder(dtype.state[1]))


def _array(record):
    _, shape, dtype, fortran, data = record.state
    return _numbers(dtype, data).reshape(shape, order="F" if fortran else "C")


ALLOWED = {("numpy", "dtype"): _Inert, ("numpy", "ndarray"): None, ("_codecs", "encode"): encode}
for _numpy in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since version 2
    ALLOWED.update({(_numpy, "_reconstruct"): _Inert, (_numpy, "scalar"): lambda dtype, data: _numbers(dtype, data)[0]})


def _batches(path, split):
    """The batches of downsampled ImageNet, as `_folder` gives images (the files are hardly larger than their pixels)."""
    there = _list_batches(path)
    if missing := [n for n in BATCHES[split] if n not in there]:
        raise UsageError(f"--data-dir {path}: {missing[0]} (or {missing[0]}.npz) is missing, which the {split} split needs")
    files, number = [there[n] for n in BATCHES[split]], _class_numbers(path / "map_clsloc.txt")
    parts = ((file.name, pixels, number[labels - 1].tolist()) for file in files for pixels, labels in [_read_batch(file)])
    return sum(file.stat().st_size for file in files), parts, 1000, split, [split]


def _class_numbers(path):
    """Their class 1 ... 1000 -> everybody else's, EDM's too: the place of its WordNet id among all. Lines: "n02119789 1 kit_fox"."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
        ids = [wordnet for _, wordnet in sorted((int(number), wordnet) for wordnet, number, *_ in words)]
        if sorted(int(number) for _, number, *_ in words) != list(range(1, 1001)) or len(set(ids)) != 1000:
            raise ValueError("not the classes 1 ... 1000")
    except (OSError, ValueError) as error:
        raise UsageError(f"--data-dir {path.parent}: {path.name} is missing or unreadable ({' '.join(str(error).split())}); it says which "
                         "classes the numbers in the batches are and comes with github.com/PatrykChrabaszcz/Imagenet32_Scripts") from None
    return np.argsort(np.argsort(ids))


def _read_batch(file):
    """Pixels (N, 3, k, k) and labels 1 ... 1000 (N,) of one file, a pickle or an npz; nothing in it is executed."""
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as batch:
                pixels, labels = batch["data"], batch["labels"]
        else:
            with open(file, "rb") as opened:
                batch = Unpickler(opened, ALLOWED, "array", encoding="latin1").load()
            pixels, labels = (_array(part) if isinstance(part, _Inert) else part for part in (batch["data"], batch["labels"]))
        labels, k = np.asarray(labels), math.isqrt(pixels.shape[-1] // 3)
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or not k or pixels.shape[1] != 3 * k * k:
            raise ValueError(f"its pixels are {pixels.dtype} of shape {pixels.shape}, not uint8 (N, 3 k k)")
        if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or labels.min() < 1 or labels.max() > 1000:
            raise ValueError(f"its labels are not {len(pixels)} numbers from 1 to 1000")
    except Exception as error:  # a foreign or damaged file raises anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"--data-dir {file}: not a readable batch of downsampled ImageNet ({said}); nothing in it was run") from None
    return pixels.reshape(-1, 3, k, k), labels


# ------------------------------------------------------------------------------------------------------------------- the stream

class Stream:
    """Endless shuffled batches of a data set, each epoch every image once.

    The order and the flips of epoch e depend on (seed, e) alone, so the whole state is one integer: `position`, the images
    drawn so far by all ranks together. Rank r of `world` gets the r-th part of every global batch of `world * batch_size`.
    Images that do not lie on the device are fetched ahead, in a thread of its own; the batches are the same.
    """

    def __init__(self, dataset, batch_size, seed, flip=False, rank=0, world=1):
        self.dataset, self.batch_size, self.seed, self.flip, self.rank, self.world = dataset, batch_size, seed, flip, rank, world
        self.position, self.epoch = 0, None
        self.thread, self.coming = ThreadPoolExecutor(1) if dataset.ahead else None, {}  # position -> future of what is fetched there

    def _draw(self, position, count):
        """Rows `index` and `flip` (2, count) of the images number position ... position + count - 1 of the stream, by the images."""
        size, parts = len(self.dataset.images), []
        while count:
            epoch, offset = divmod(position, size)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                order = np.stack([rng.permutation(size), rng.random(size) < 0.5])
                self.epoch, self.order = epoch, torch.from_numpy(order).to(self.dataset.images.device)
            parts.append(self.order[:, offset:offset + count])
            position, count = position + parts[-1].shape[1], count - parts[-1].shape[1]
        return torch.cat(parts, 1)

    def _fetch(self, position):
        """uint8 images (batch_size, C, H, W) and rows `index`, `flip` of this rank's batch at a position of the stream."""
        images, drawn = self.dataset.images, self._draw(position + self.rank * self.batch_size, self.batch_size)
        if not self.thread:
            return images[drawn[0]], drawn
        rows, places = drawn[0].sort()  # a disk likes to be read in order
        batch = torch.empty(len(rows), *images.shape[1:], dtype=torch.uint8)
        batch[places] = images[rows]
        return (batch.pin_memory(), drawn.pin_memory()) if self.dataset.device.type == "cuda" else (batch, drawn)

    def next(self):
        """The next batch of this rank: x0 (batch_size, C, H, W) float32 in [-1, 1], labels (batch_size,) int64."""
        step = self.world * self.batch_size
        if self.thread:  # what was fetched for other positions than the next ones (after a resume) is dropped here
            wanted = range(self.position, self.position + (AHEAD + 1) * step, step)
            self.coming = {p: self.coming.get(p) or self.thread.submit(self._fetch, p) for p in wanted}
            fetched = self.coming.pop(self.position).result()
        else:
            fetched = self._fetch(self.position)
        images, (index, flip) = (part.to(self.dataset.device, non_blocking=True) for part in fetched)
        self.position += step
        x0 = to_float(images)
        if self.flip:
            x0 = torch.where(flip.bool()[:, None, None, None], x0.flip(-1), x0)
        return x0, self.dataset.labels[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
