"""Folders and zips of images: which files are images, what their splits and classes are."""
import contextlib
import hashlib
import io
import json
import math
import os
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UsageError
from common.machinery.files import BAR, PACKINGS, atomic_write, cache_dir, locked
from common.machinery.foreign import Refused, file_size, one_line, refusing

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # else
# Splits that a folder can be named after; of several for testing the first one is taken.
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # PIL's EPS runs Ghostscript
# Of an image: pixels in a row, bytes of its file, scans of a JPEG, each of which takes time.
LARGEST, MOST_IMAGE, MOST_SCANS = 1024, 2**24, 1000
IN_MEMORY = 2**30  # bytes of pixels from which on a source is unpacked into the cache and mapped


@dataclass
class Source:
    """One split of a folder or zip, not yet read."""

    folder: "Folder"
    names: list         # of its images
    labels: list        # their classes, 0 without
    num_classes: int
    split: str          # "train" | "test" | "all"
    about: str          # what was found, in words
    shape: tuple        # (N, C, H, W), if all are like the first

    @property
    def large(self):
        return math.prod(self.shape) >= IN_MEMORY

    def load(self):
        """The images (N, C, H, W), uint8. Raises UsageError for mixed shapes.

        Large ones are decoded once, into one file in the cache, and mapped from there, as long as
        the folder's `stamp` is the same.
        """
        if not self.large:
            return torch.from_numpy(np.stack(list(self._pixels())))
        source = hashlib.sha256(os.fsencode(self.folder.path)).hexdigest()[:16]
        stamped, place = f"{source}-{self.folder.stamp()}", cache_dir() / "data"
        path, size = place / f"{stamped}-{self.split}.pixels", math.prod(self.shape)
        with locked(place / source):
            if not (path.exists() and path.stat().st_size == size):
                for old in place.glob(f"{source}-*"):
                    if old.name.endswith(".part") or not old.name.startswith(stamped):
                        old.unlink()
                # Not written through a map: there a full disk would be a SIGBUS.
                atomic_write(path, lambda file: file.writelines(self._pixels()))
        # Shared, for a private map would be charged as memory; nobody writes there.
        return torch.from_file(str(path), True, size, dtype=torch.uint8).view(self.shape)

    def _pixels(self):
        """Yield the pixels (C, H, W) of all images."""
        place, small = one_line(self.folder.path), math.prod(self.shape) < 2**24
        for name in tqdm(self.names, f"reading {place}", disable=small, **BAR):
            image = self.folder.read(name)
            if image.shape != self.shape[1:]:
                raise UsageError(
                    f"--data-dir {place}: {one_line(name)} is {image.shape} (channels, height, "
                    f"width), but {one_line(self.names[0])} is {self.shape[1:]}; all must be the "
                    "same: resize them, convert grey ones to RGB"
                )
            yield np.ascontiguousarray(image)


class Folder:
    """The images of the folder or zip that --data-dir names. Raises UsageError where it has none.

    path     absolute
    root     of their names: "" or one folder that encloses all
    names    sorted, relative to the root, with "/". A file is an image by its ending, or by its
             first bytes; hidden files and folders are none. Symbolic links are followed
    parts    its splits {folder: names}: folders called `train` and `test`, or `val`, `valid`,
             `validation`; {"": names} without
    labels   {name: class}, classes: their names. Of `dataset.json` as EDM's dataset_tool writes
             it, {"labels": [[file, class], ...] or null}, then `by_edm` is true; or else of the
             folders below, in the order of their numbers where all are numbers
    skipped  what was left out, in words

    Images beside folders of splits or classes could be anything, and are refused. Nothing of a
    zip is written to the disk, so a name like "../a.png" leads nowhere.
    """

    def __init__(self, data_dir):
        if data_dir is None:
            images = "a folder of images (a sub-folder per class) or a zip of EDM's dataset_tool"
            raise UsageError(f"--data-dir: name {images}")
        self.path, self.root, self.archive = Path(data_dir).resolve(), "", None
        if not self.path.is_dir():
            with refusing(f"--data-dir {self.path}: neither a folder nor a zip file"):
                file_size(self.path)  # not a pipe
                self.archive = zipfile.ZipFile(self.path)
        self._find_images()
        tops = {_top(name) for name in self.names} - {None}
        words = SPLITS["train"] + SPLITS["test"]
        splits = [top for word in words for top in tops if top.lower() == word]
        self.parts = {top: [n for n in self.names if _top(n) == top] for top in splits}
        self.parts = self.parts or {"": self.names}
        self._refuse_beside(splits, self.names)
        find_labels = self._labels_of_file if self.by_edm else self._labels_of_folders
        self.labels, self.classes = find_labels()

    def _find_images(self):
        names = self.archive.namelist() if self.archive else _walk(self.path)
        found, others, tops = [], Counter(), set()
        for name in names:
            *folders, file = name.split("/")
            if any(part == "__MACOSX" or part.startswith(".") and part != ".."
                   for part in (*folders, file)):
                others["hidden"] += 1
            elif file == "dataset.json" or file and self._is_image(name):
                tops.add(folders[0] if folders else "")
                found.append(name)
            elif file:
                others["no image"] += 1
        top, *more = tops or ("",)
        if top and not more and top.lower() not in SPLITS["train"] + SPLITS["test"]:
            self.root = f"{top}/"
        found = sorted(name[len(self.root):] for name in found)
        self.by_edm = "dataset.json" in found
        self.names = [name for name in found if name.split("/")[-1] != "dataset.json"]
        if not self.names:
            raise UsageError(f"--data-dir {self.path}: no images in it ({' '.join(ENDINGS)})")
        self.skipped = "".join(f"; {n:,} skipped ({kind})" for kind, n in others.items())

    def _is_image(self, name):
        if name.lower().endswith(ENDINGS):
            return True
        with contextlib.suppress(Exception), self.open(name, MOST_IMAGE) as file:
            return file.read(4).startswith(BEGINNINGS)
        return False

    def open(self, name, most):
        """A file below the root, open for reading. Raises Refused for more than `most` bytes."""
        name = self.root + name
        entry = self.archive.getinfo(name) if self.archive else None
        size = entry.file_size if entry else file_size(self.path / name)
        if size > most or entry and entry.compress_type not in PACKINGS:
            raise Refused(f"not a file of at most {most:,} bytes, in a zip stored or deflated")
        return self.archive.open(entry) if entry else open(self.path / name, "rb")

    def _refuse_beside(self, folders, names, start=0):
        """UsageError if there are `folders` and one of the `names` lies in none of them."""
        for name in names if folders else ():
            if _top(name, start) not in folders:
                shown = one_line(", ".join(sorted(folders)[:3]))
                raise UsageError(
                    f"--data-dir {self.path}: {one_line(name)} lies beside the folders {shown}: "
                    "move it into one of them, or away"
                )

    def _labels_of_file(self):
        most = 2**22 + sum(len(name) + 100 for name in self.names)  # bytes of the JSON
        wanted = '{"labels": [[file, class number], ...]}'
        with refusing(f"--data-dir {self.path}: dataset.json is not {wanted}"):
            with self.open("dataset.json", most) as file:
                labels = {name: int(label) for name, label in json.load(file)["labels"] or []}
            if labels and not 0 <= min(labels.values()) <= max(labels.values()) < 10**5:
                raise Refused("class numbers must lie in 0 ... 99999")
            for name in self.names if labels else ():
                if name not in labels:
                    raise Refused(f"{one_line(name)} has no label")
        return labels, list(map(str, range(max(labels.values(), default=-1) + 1)))

    def _labels_of_folders(self):
        folder_of = {}
        for part, names in self.parts.items():
            start = len(part) + bool(part)
            folders = {_top(name, start) for name in names} - {None}
            self._refuse_beside(folders, names, start)
            folder_of |= {name: _top(name, start) for name in names if folders}
        classes = {*folder_of.values()}
        if len(classes) < 2:
            return {}, []
        order = int if all(map(str.isdecimal, classes)) else str
        classes = sorted(classes, key=lambda name: (order(name), name))
        number = {name: i for i, name in enumerate(classes)}
        return {name: number[folder] for name, folder in folder_of.items()}, classes

    def split_folder(self, split):
        """The folder of a split; None without."""
        return next((top for top in self.parts if top.lower() in SPLITS[split]), None)

    def source(self, split):
        """The Source of one split, not yet read. Without one of its own: all images."""
        own, skipped = self.split_folder(split), self.skipped
        if own:
            names, about = self.parts[own], f"{split} split"
            used = [self.split_folder(s) for s in SPLITS]
            skipped += "".join(f"; not {top}" for top in self.parts if top not in used)
        else:
            names, about = sorted(sum(self.parts.values(), [])), f"no {split} split"
        counts = Counter(self.labels[n] for n in names if n in self.labels)
        classes = self.classes if counts else []  # flat test images of a set with classes
        shown = [f"{k} {one_line(classes[k])} ({counts[k]:,})" for k in sorted(counts)[:12]]
        more = ", ..." * (len(counts) > 12)
        what = f"{len(classes)} classes: {', '.join(shown)}{more}" if classes else "no classes"
        labels, split = [self.labels.get(n, 0) for n in names], split if own else "all"
        shape, about = (len(names), *self.read(names[0]).shape), f"{about}; {what}{skipped}"
        return Source(self, names, labels, len(classes), split, about, shape)

    def stamp(self, times=True):
        """16 hex digits of the names, sizes and (with `times`) times of all files."""
        files = [self.path] if self.archive else [
            f"{self.path}/{self.root}{name}" for name in [*self.names, "dataset.json"]
        ]
        digest = hashlib.sha256(b"2")  # of what is read of them: another number for other pixels
        for file in filter(os.path.exists, files):
            s = os.stat(file)
            digest.update(os.fsencode(f"{file}\n{s.st_size} {s.st_mtime_ns * times}\n"))
        return digest.hexdigest()[:16]

    def read(self, name):
        """One square image -> (C, H, W) uint8. Its head is checked before it is decoded."""
        place = f"--data-dir {self.path}: {one_line(name)}"
        with refusing(f"{place} is not a readable image"):
            with self.open(name, MOST_IMAGE) as file:
                data = file.read()
            if data.count(b"\xff\xda") > MOST_SCANS:
                raise Refused("more scans than a JPEG has")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's about large images
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    width, height = image.size
                    if width == height <= LARGEST:
                        return _pixels(image)
        raise UsageError(
            f"{place} is {width}x{height}; images must be square, and at most {LARGEST} pixels "
            "wide: crop or scale copies of them"
        )


def _top(name, start=0):
    """The folder that a name begins with, behind its first `start` characters; or None."""
    top, slash, _ = name[start:].partition("/")
    return top if slash else None


def _walk(path):
    """The names of all files below a folder. Raises UsageError for links that go in circles."""
    for folder, folders, files in os.walk(path, followlinks=True):
        for link in filter(os.path.islink, (os.path.join(folder, name) for name in folders)):
            above = [Path(folder), *Path(folder).parents]
            if os.path.realpath(link) in map(os.path.realpath, above):
                raise UsageError(f"--data-dir {path}: the link {one_line(link)} leads in a circle")
        for file in files:
            yield os.path.join(folder, file)[len(str(path)) + 1:].replace(os.sep, "/")


def _pixels(image):
    """Grey or RGB (C, H, W): turned as EXIF says, 16 bits scaled to 8, on white if transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() >= 2**16:
            raise Refused("more than 16 bits")
        return ((levels + 128) // 257).astype(np.uint8)[None]
    if image.mode == "F":
        raise Refused("floating point numbers")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
