"""Data sets, whole and as uint8: `digits` (in the repository), `mnist`, `cifar10`, `folder`.

`load_dataset` gives a `Dataset`. A `Stream` over it gives shuffled float batches without end
and resumes from one integer.
"""
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import UsageError
from common.machinery.files import cache_dir, locked
from common.machinery.folders import Folder
from common.machinery.foreign import one_line, refusing
from common.machinery.options import DATASETS
from common.machinery.ranks import rank_and_world

SHAPES = {
    "digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet64": (3, 64, 64),
}
ASSETS = Path(__file__).parent / "assets"


@dataclass
class Dataset:
    """A whole data set. Its batches go to `device`."""

    name: str
    images: torch.Tensor  # (N, C, H, W) uint8, on `device` unless too large
    labels: torch.Tensor  # (N,) int64, on `device`, all 0 where there are none
    num_classes: int      # 0: no labels
    split: str            # "train" | "test" | "all": no test part, both are all images
    ahead: bool = False   # the images are elsewhere, or in a file: batches are fetched ahead

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
    """Read one split ("train" | "test") of one of DATASETS onto `device`.

    A GPU holds the images where they fit into half of its free memory.

    data_dir, for `folder` and `imagenet64`: a folder of images or a zip of EDM's dataset_tool;
    for `mnist` and `cifar10`: where the original files lie or are downloaded to (default: the
    cache); for `cifar10` also a folder with `train/<class>/` and `test/<class>/`. Downsampled
    ImageNet becomes a folder by `notebooks/imagenet_to_png.py`.

    Raises UsageError where the data is missing, unreadable or of mixed shapes.
    """
    device, place, mapped = torch.device(device), _source(name, data_dir), False
    if name == "digits":
        images, labels, num_classes = *_digits(split), 10
    elif place in ("mnist", "cifar10"):
        images, labels, num_classes = *_torchvision(name, split, data_dir), 10
    elif place in ("folder", "imagenet64"):
        folder = Folder(data_dir)
        source = folder.source(split)
        labels, num_classes, split = source.labels, source.num_classes, source.split
        images, mapped = source.load(), source.large
        found = f"{len(images):,} images of {images.shape[2]}x{images.shape[3]}, {source.about}"
        say_once(f"{one_line(folder.path)}: {found}")
    else:
        raise UsageError(f"--dataset {name}: unknown, choose one of {', '.join(DATASETS)}")
    images, labels = torch.as_tensor(images), torch.as_tensor(labels).long().to(device)
    if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    ahead = images.device.type == "cpu" and (mapped or device.type != "cpu")
    return Dataset(name, images, labels, num_classes, split, ahead)


def _source(name, data_dir):
    """How the images lie there: a data set's name, or "folder" for CIFAR-10 as image files."""
    as_files = name == "cifar10" and data_dir and (Path(data_dir) / "train").is_dir()
    return "folder" if as_files else name


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Images in [-1, 1] -> uint8, clipped, rounded as in EDM; inverse of `to_float`."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def evenly(images, n):
    """At most n of the images, evenly from all: folders lie class by class."""
    return images[:: max(1, -(-len(images) // n))]


# --------------------------------------------------------------------------- the sources


def _digits(split):
    """1,500 training images; the last 297 of the source, by other writers, for testing."""
    with np.load(ASSETS / "digits.npz") as file:
        part = slice(0, 1500) if split == "train" else slice(1500, None)
        return file["images"][part, None], file["labels"][part]


def _torchvision(name, split, data_dir):
    """MNIST or CIFAR-10, downloaded with its checksums unless it lies in `data_dir`."""
    from torchvision import datasets as tv
    root = Path(data_dir or cache_dir() / "data")
    if name == "mnist":
        source, urls, place = tv.MNIST, tv.MNIST.mirrors, root / "MNIST" / "raw"
        files = [file for file, _ in tv.MNIST.resources]
    else:
        source, urls, place = tv.CIFAR10, [tv.CIFAR10.url], root
        files = [tv.CIFAR10.filename]
    what = f"--dataset {name}: no readable copy in {place}, no download"
    hint = (
        f"; fetch by hand {' '.join(files)} from {' or '.join(urls)} "
        f"and put it into {place} (or name its place by --data-dir)"
    )
    with locked(cache_dir() / "data" / name), refusing(what, hint):
        data = source(root, split == "train", download=True)
    images = np.asarray(data.data)  # MNIST: (N, H, W), CIFAR-10: (N, H, W, C)
    images = images[:, None] if name == "mnist" else images.transpose(0, 3, 1, 2).copy()
    return images, data.targets


def class_shares(name, data_dir):
    """The share of each class (K,) in a `folder` with classes; None for other data sets."""
    if name != "folder" or not data_dir:
        return None
    source = Folder(data_dir).source("train")
    counts = torch.bincount(torch.tensor(source.labels), minlength=source.num_classes)
    return counts.double() / len(source.names) if source.num_classes else None


@functools.cache
def say_once(line):
    """Print a line, on rank 0, the first time."""
    if rank_and_world()[0] == 0:
        print(line)


def fingerprint(name, data_dir, exact=False):
    """"" for a data set that its name identifies; else "-" and 16 hex digits.

    They are of its place and of the names and sizes of its files. exact: and of their times.
    """
    name = _source(name, data_dir)
    if name != "folder" and (name != "imagenet64" or data_dir is None):
        return ""
    return f"-{Folder(data_dir).stamp(times=exact)}"


def is_edms(name, data_dir):
    """Whether EDM's published moments are of such images: ImageNet by its dataset_tool."""
    return name != "imagenet64" or not data_dir or Folder(data_dir).by_edm


def has_test_images(name, data_dir):
    """Whether held-out images are at hand, without a download."""
    places = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py"}
    name = _source(name, data_dir)
    if name in places:
        return (Path(data_dir or cache_dir() / "data") / places[name]).is_dir()
    if name == "digits":
        return True
    folder = Folder(data_dir)
    return len(folder.parts.get(folder.split_folder("test"), ())) > 1


def shape_of(name, data_dir):
    """(C, H, W) of one image: from the name, or from the first image of a `folder`."""
    if name != "folder":
        return SHAPES[name]
    return Folder(data_dir).source("train").shape[1:]


# ---------------------------------------------------------------------------- the stream


class Stream:
    """Endless shuffled batches of a data set; every epoch has each image once.

    `batch_size` counts the images of all ranks together. `ranks` is (rank, world), by
    default of this process: rank r gets the r-th of `world` equal parts of each batch.
    The order and the flips of an epoch depend on (seed, epoch) alone, so the whole state is
    one integer: `position`, the number of images drawn so far by all ranks together.
    Images that do not lie on the device are fetched ahead, in a thread.
    Raises UsageError where the ranks cannot get equal parts.
    """

    def __init__(self, dataset, batch_size, seed, flip=False, ranks=None):
        self.dataset, self.seed, self.flip = dataset, seed, flip
        self.rank, world = ranks or rank_and_world()
        if batch_size % world:
            raise UsageError(f"--batch-size {batch_size}: must be a multiple of the {world} ranks")
        if len(dataset.images) < 2:
            raise UsageError(f"--dataset {dataset.name}: one image; training needs two, FID too")
        self.batch_size = batch_size
        self.part = batch_size // world  # images of this rank in a batch
        self.position, self.epoch = 0, None
        self.thread = ThreadPoolExecutor(1) if dataset.ahead else None
        self.coming = None, None  # a position, and the future of the batch there

    def _draw(self, position, n):
        """Rows `index` and `flip` (2, n) of the n images from `position` on."""
        size, parts = len(self.dataset.images), []
        while n:
            epoch, offset = divmod(position, size)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                order = np.stack([rng.permutation(size), rng.random(size) < 0.5])
                self.order = torch.from_numpy(order).to(self.dataset.images.device)
                self.epoch = epoch
            part = self.order[:, offset:offset + n]
            parts.append(part)
            position, n = position + part.shape[1], n - part.shape[1]
        return torch.cat(parts, 1)

    def _fetch(self, position):
        """This rank's part of the batch at `position`: uint8 images, `index` and `flip`."""
        images = self.dataset.images
        drawn = self._draw(position + self.rank * self.part, self.part)
        if not self.thread:
            return images[drawn[0]], drawn
        rows, places = drawn[0].sort()  # a disk is read fastest in order
        batch = torch.empty(len(rows), *images.shape[1:], dtype=torch.uint8)
        batch[places] = images[rows]
        if self.dataset.device.type == "cuda":
            return batch.pin_memory(), drawn.pin_memory()
        return batch, drawn

    def _fetch_ahead(self):
        """As `_fetch` at the current position; the thread goes on with the next one."""
        (position, batch), step = self.coming, self.batch_size
        if position != self.position:  # the first one, or after a resume
            batch = self.thread.submit(self._fetch, self.position)
        self.coming = self.position + step, self.thread.submit(self._fetch, self.position + step)
        return batch.result()

    def next(self):
        """This rank's part of the next batch, n = batch_size / world images.

        x0 (n, C, H, W) float32 in [-1, 1], labels (n,) int64.
        """
        fetched = self._fetch_ahead() if self.thread else self._fetch(self.position)
        device = self.dataset.device
        images, (index, flip) = (part.to(device, non_blocking=True) for part in fetched)
        self.position += self.batch_size
        x0 = to_float(images)
        if self.flip:
            x0 = torch.where(flip.bool()[:, None, None, None], x0.flip(-1), x0)
        return x0, self.dataset.labels[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
