"""Downsampled ImageNet (Chrabaszcz et al. 2017, arXiv:1707.08819) as a folder of images.

    python notebooks/imagenet_to_png.py DIR OUT
    python ld3.py --dataset imagenet64 --data-dir OUT --reference train

DIR: the npz files of image-net.org, train_data_batch_1.npz ... val_data.npz, and map_clsloc.txt,
the list of their classes, of github.com/PatrykChrabaszcz/Imagenet32_Scripts. Their class numbers
are not the usual ones. Folders are named after the classes' WordNet ids here, in whose order the
classes have their usual numbers, which EDM's models know.

These are whole images, resized by a box filter, and EDM's are centre crops: a FID against the
reference of the other means nothing.
"""
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def convert(source, out):
    lines = (source / "map_clsloc.txt").read_text().splitlines()
    ids = {int(number): wordnet for wordnet, number, *_ in map(str.split, lines)}
    for file in sorted(source.glob("*_data*.npz")):
        with np.load(file) as batch:
            pixels, labels = batch["data"], batch["labels"].tolist()
        side = math.isqrt(pixels.shape[1] // 3)
        images = pixels.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        for i, (image, label) in enumerate(zip(images, labels)):
            folder = out / file.name.split("_")[0] / ids[label]  # train or val
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{file.stem}-{i:06d}.png")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
