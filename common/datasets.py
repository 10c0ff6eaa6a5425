"""Data sets, whole and as uint8 on the device: `digits` (in the repository), `mnist`, `cifar10`, `imagenet64`, `folder`.

`load_dataset` gives a `Dataset`, a `Stream` over it gives shuffled float batches for ever, and resumes from one integer.
"""
import contextlib
import fcntl
import gzip
import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.training import UsageError, cache_dir

DATASETS = ("digits", "mnist", "cifar10", "imagenet64", "folder")
ASSETS = Path(__file__).parent / "assets"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}


@dataclass
class Dataset:
    """A whole data set on one device."""
    name: str
    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,) int64, all 0 where there are none
    num_classes: int      # 0: no labels
    split: str            # "train" | "test" | "all": "all" where the source has no test part and both splits are the same images

    @property
    def resolution(self):
        return self.images.shape[-1]

    @property
    def channels(self):
        return self.images.shape[1]


def load_dataset(name, split="train", data_dir=None, device="cpu"):
    """Read one split ("train" | "test") of one of DATASETS onto `device`.

    `data_dir`: a folder of images or an EDM-style zip for `folder` and `imagenet64`; elsewhere where the original files lie
    or are downloaded to (the cache by default). Raises UsageError where the data is missing, unreadable or of mixed shapes.
    """
    if name == "digits":
        images, labels, num_classes = *_digits(split), 10
    elif name in ("mnist", "cifar10"):
        images, labels, num_classes = *_torchvision(name, split, data_dir), 10
    elif name in ("folder", "imagenet64"):
        images, labels, num_classes, split = _folder(name, split, data_dir)
    else:
        raise UsageError(f"--dataset {name}: unknown, choose one of {', '.join(DATASETS)}")
    return Dataset(name, torch.as_tensor(images).to(device), torch.as_tensor(labels).long().to(device), num_classes, split)


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


def _list_images(name, data_dir):
    """Sorted names of the images in a folder or a zip (relative, with '/'), and a function that opens a file of it by name."""
    if data_dir is None:
        raise UsageError(f"--dataset {name}: give --data-dir, a folder of images (a sub-folder per class) or a zip of EDM's dataset_tool")
    path = Path(data_dir)
    if path.is_dir():
        names, opener = (file.relative_to(path).as_posix() for file in path.rglob("*")), lambda file: open(path / file, "rb")
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names, opener = archive.namelist(), archive.open
    else:
        raise UsageError(f"--data-dir {path}: neither a folder nor a zip file")
    images = sorted(n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and not Path(n).name.startswith("."))
    if not images:
        raise UsageError(f"--data-dir {path}: no images in it ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return images, opener


def fingerprint(name, data_dir):
    """"" for a data set that its name identifies; for `folder` and `imagenet64` "-" and 8 hex digits of the place and the image count."""
    if name not in ("folder", "imagenet64"):
        return ""
    return "-" + hashlib.sha256(f"{Path(data_dir or '').resolve()} {len(_list_images(name, data_dir)[0])}".encode()).hexdigest()[:8]


def channels_of(name, data_dir):
    """1 (grey) or 3 (RGB), from the name or from one image: nothing is loaded or downloaded."""
    if name not in ("folder", "imagenet64"):
        return 3 if name == "cifar10" else 1
    names, opener = _list_images(name, data_dir)
    return len(_read_image(data_dir, names[0], opener))


def _folder(name, split, data_dir):
    """Images (N, C, H, W), labels, number of classes and split of a folder or zip.

    Labels: `dataset.json` ({"labels": [[file, class], ...] or null}, as EDM writes it) or else the first-level sub-folder.
    If `train` and `test` are the first level, they are the splits; a split that has no folder is all the images.
    """
    names, opener = _list_images(name, data_dir)
    tops = {n.split("/")[0] for n in names}
    below = {n: n.split("/", 1)[1] if tops <= {"train", "test"} else n for n in names}  # the name below the level of the splits
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
        raise UsageError(f'--data-dir {data_dir}: dataset.json is not {{"labels": [[file, class number], ...]}} ({error})') from None
    if classes and (unknown := [n for n in names if n not in label_of]):
        raise UsageError(f"--data-dir {data_dir}: {unknown[0]} has no label in dataset.json")
    if tops <= {"train", "test"} and split in tops:
        names = [n for n in names if n.startswith(split + "/")]
    else:
        split = "all"
    images = None
    for i, n in enumerate(tqdm(names, f"reading {data_dir}", disable=len(names) < 5000, dynamic_ncols=True, mininterval=0.5)):
        image = _read_image(data_dir, n, opener)
        images = np.empty((len(names), *image.shape), np.uint8) if images is None else images
        if image.shape != images.shape[1:]:
            raise UsageError(f"--data-dir {data_dir}: {n} is {image.shape} (channels, height, width), but {names[0]} is "
                             f"{images.shape[1:]}; all must be the same")
        images[i] = image
    return images, [label_of.get(n, 0) for n in names], len(classes), split


def _read_image(data_dir, name, opener):
    """One square grey or RGB image -> (C, H, W) uint8."""
    from PIL import Image
    try:
        with opener(name) as file, Image.open(file) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # PIL's decoders raise many kinds
        raise UsageError(f"--data-dir {data_dir}: {name} is not a readable image ({error})") from None
    if mode not in ("L", "RGB") or pixels.shape[0] != pixels.shape[1]:
        raise UsageError(f"--data-dir {data_dir}: {name} is {pixels.shape[1]}x{pixels.shape[0]} of PIL mode {mode}; "
                         "images must be square and of mode L or RGB")
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------------------------- the stream

class Stream:
    """Endless shuffled batches of a data set, each epoch every image once.

    The order and the flips of epoch e depend on (seed, e) alone, so the whole state is one integer: `position`, the images
    drawn so far by all ranks together. Rank r of `world` gets the r-th part of every global batch of `world * batch_size`.
    """

    def __init__(self, dataset, batch_size, seed, flip=False, rank=0, world=1):
        self.dataset, self.batch_size, self.seed, self.flip, self.rank, self.world = dataset, batch_size, seed, flip, rank, world
        self.position, self.epoch = 0, None

    def _draw(self, position, count):
        """Rows `index` and `flip` (2, count) of the images number position ... position + count - 1 of the stream, on the device."""
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

    def next(self):
        """The next batch of this rank: x0 (batch_size, C, H, W) float32 in [-1, 1], labels (batch_size,) int64."""
        index, flip = self._draw(self.position + self.rank * self.batch_size, self.batch_size)
        self.position += self.world * self.batch_size
        x0 = to_float(self.dataset.images[index])
        if self.flip:
            x0 = torch.where(flip.bool()[:, None, None, None], x0.flip(-1), x0)
        return x0, self.dataset.labels[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
