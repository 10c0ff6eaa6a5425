"""Folders and zips of images: which files are images, what their splits and classes are."""
import contextlib
import functools
import json
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import UsageError
from common.machinery.files import BAR, PACKINGS
from common.machinery.foreign import Refused, file_size, one_line

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # else
# Splits that a folder can be named after; of several for testing the first one is taken.
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # PIL's EPS runs Ghostscript
LARGEST, MOST_IMAGE = 4096, 2**26  # pixels in a row, bytes of an image's file


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


# ---------------------------------------------------------------------------- what lies on the disk


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


# ------------------------------------------------------------------------------------ what it means


def layout(path):
    """What a folder or zip is taken for: splits {folder: names}, labels {name: class}, classes.

    Splits are folders called `train` and `test`, or `val`, `valid`, `validation`; {"": names}
    without. Classes: `dataset.json` as EDM writes it, {"labels": [[file, class], ...] or null}, or
    else the folders below, in the order of their numbers where all are numbers. Also: words for
    what was left out, and the function that opens an image. Raises UsageError for images beside
    folders of splits or classes, which could be anything.
    """
    _, names, opener, others = list_images(path)
    tops = {name.partition("/")[0] for name in names if "/" in name}
    known = [top for split in SPLITS.values() for word in split for top in tops
             if top.lower() == word]
    for name in names if known else ():
        _check_place(path, name, name.partition("/")[0] in known, known)
    parts = {top: [n for n in names if n.startswith(f"{top}/")] for top in known} or {"": names}
    labels = _labels_file(path, names, opener)
    if labels is None:
        folder_of = {}
        for part, files in parts.items():
            below = {name: name[len(part) + bool(part):].split("/") for name in files}
            found = {name: words[0] for name, words in below.items() if len(words) > 1}
            for name in files if found else ():
                _check_place(path, name, name in found, sorted({*found.values()})[:3])
            folder_of |= found
        classes = {*folder_of.values()}
        order = int if all(map(str.isdecimal, classes)) else str
        classes = sorted(classes, key=lambda name: (order(name), name)) if len(classes) > 1 else []
        number = {name: i for i, name in enumerate(classes)}
        labels = {name: number[top] for name, top in folder_of.items() if number}
    else:
        classes = list(map(str, range(max(labels.values(), default=-1) + 1)))
    skipped = "".join(f"; {n:,} skipped ({kind})" for kind, n in others.items())
    return parts, labels, classes, skipped, opener


def _check_place(path, name, right, folders):
    if not right:
        raise UsageError(
            f"--data-dir {path}: {one_line(name)} lies beside the folders "
            f"{one_line(', '.join(folders))}: move it into one of them, or away"
        )


def read_folder(path, split):
    """One split of a folder or zip of images, not yet read. Without one of its own: all images."""
    parts, labels, classes, skipped, opener = layout(path)
    own = {s: next((top for top in parts if top.lower() in SPLITS[s]), None) for s in SPLITS}
    if own[split]:
        names, serves, name = parts.pop(own[split]), [split], split
        skipped += "".join(f"; not {top}" for top in parts if top not in own.values())
    else:
        names, name = sorted(sum(parts.values(), [])), "all"
        serves = [s for s in own if not own[s]]
    counts = Counter(labels[n] for n in names if n in labels)
    classes = classes if counts else []  # flat test images of a training set with classes
    about = f"{split} split" if own[split] else f"no {split} split"
    if classes:
        shown = [f"{k} {one_line(classes[k])} ({counts[k]:,})" for k in sorted(counts)[:12]]
        about += f"; {len(classes)} classes: {', '.join(shown)}{', ...' * (len(counts) > 12)}"
    about += skipped if classes else f"; no classes{skipped}"
    pixels = ((n, read_image(path, n, opener)[None], [labels.get(n, 0)]) for n in names)
    size = len(names) * read_image(path, names[0], opener).nbytes
    return Source(path, size, pixels, len(classes), name, serves, about)


def _labels_file(path, names, opener):
    """{name: class} of dataset.json, {} where it has none; None without that file."""
    most = max(2**24, sum(len(name) + 40 for name in names))  # bytes of the JSON
    try:
        with opener("dataset.json", most) as file:
            text = file.read()
        if text.count(b"[") + text.count(b"{") > 2 * len(names) + 10**5:
            raise ValueError("more lists than images")  # they take many times their text
        labels = {name: int(label) for name, label in json.loads(text)["labels"] or []}
        if labels and not 0 <= min(labels.values()) <= max(labels.values()) < 10**5:
            raise ValueError("class numbers must lie in 0 ... 99999")
    except (FileNotFoundError, KeyError):  # no such file, or none in the zip
        return None
    except Exception as error:  # damaged zips and JSON raise many kinds
        wanted, reason = '{"labels": [[file, class number], ...]}', one_line(error)
        raise UsageError(f"--data-dir {path}: dataset.json is not {wanted} ({reason})") from None
    for name in names if labels else ():
        if name not in labels:
            raise UsageError(f"--data-dir {path}: {one_line(name)} has no label in dataset.json")
    return labels


def read_image(path, name, opener):
    """One square image -> (C, H, W) uint8. Its head is checked before it is decoded."""
    from PIL import Image
    try:
        with warnings.catch_warnings(), opener(name, MOST_IMAGE) as file:
            warnings.simplefilter("ignore")  # PIL's about large images
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width == height <= LARGEST:
                    return _pixels(image)
    except Exception as error:  # PIL's decoders raise many kinds
        reason = f"{one_line(name)} is not a readable image ({one_line(error)})"
        raise UsageError(f"--data-dir {path}: {reason}") from None
    raise UsageError(
        f"--data-dir {path}: {one_line(name)} is {width}x{height}; images must be square, and at "
        f"most {LARGEST} pixels wide: crop or scale copies of them"
    )


def first_image(path):
    """The first image of a folder or zip, (C, H, W) uint8."""
    _, names, opener, _ = list_images(path)
    return read_image(path, names[0], opener)


def _pixels(image):
    """Grey or RGB (C, H, W): turned as EXIF says, 16 bits scaled to 8, on white if transparent."""
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() >= 2**16:
            raise ValueError("more than 16 bits")
        return ((levels + 128) // 257).astype(np.uint8)[None]
    if image.mode == "F":
        raise ValueError("floating point numbers")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
