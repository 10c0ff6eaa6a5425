"""How good is a teacher? Its samples beside the test images, measured in the same way.

    python notebooks/teacher_quality.py --dataset mnist --data-dir DIR

Against the training images: FID and KID in the features of two classifiers, with --fd also in those
of EfficientNet-Lite0, precision and recall. A third classifier, of another seed, says how many
samples are clearly of one class, and of a conditional teacher how many are of the class that was
asked for. Leaves quality.json and nearest.png: 64 samples, and below each the training image
nearest to it (2-norm of pixels).
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

from common.classifier import load_classifier
from common.datasets import evenly, load_dataset, to_float, to_uint8
from common.diffusion import noise_from_seeds, sigma_grid, with_labels
from common.fid import (
    Evaluator,
    Metrics,
    classifier_features,
    features_of,
    imagenet_features,
    labels_for,
    reference_moments,
)
from common.machinery.files import BAR, save_json
from common.machinery.options import DATASETS, cli, option, parse_config
from common.machinery.plots import save_rows
from common.machinery.run import pick_device
from common.solvers import heun
from common.teacher import load_teacher

INDEPENDENT = 2  # seeds 0 and 1 are those of the FIDs; no teacher has seen 2, only GDD's students


@dataclass
class Config:
    dataset: str = option("mnist", "data set", choices=DATASETS)
    data_dir: str | None = option(None, "where the data lies")
    teacher: str | None = option(None, "teacher checkpoint (default: the data set's own)")
    n: int = option(10_000, "samples", low=100)
    batch: int = option(32, "images per batch while sampling", low=1)
    fd: bool = option(False, "also fd: distance in ImageNet features of EfficientNet-Lite0")
    device: str = option("auto", "auto, cpu or cuda")
    out: str = option("notebooks/results/mnist-teacher", "where the results go")


@torch.no_grad()
def sample(teacher, n, batch, device):
    """n images, uint8 (n, C, H, W), of the seeds 0, 1, 2, ... by EDM's sampler of 35 evaluations."""
    sigmas = torch.cat([sigma_grid("edm", 17), torch.zeros(1, dtype=torch.float64)])
    images = []
    for seeds in tqdm(torch.arange(n).split(batch), "sampling", **BAR):
        noise = noise_from_seeds(seeds, teacher.net.img_shape, device)
        labels = labels_for(seeds, teacher.net.label_dim, device)
        x0 = heun(with_labels(teacher, labels), 80.0 * noise, sigmas)
        images.append(to_uint8(x0).cpu())
    return torch.cat(images)


@torch.no_grad()
def probabilities(classifier, images, device):
    """The class probabilities of uint8 images (N, C, H, W) -> (N, K)."""
    return features_of(images, lambda part: classifier(to_float(part.to(device)))[1].softmax(1).cpu())


def nearest(images, candidates):
    """For each of images (n, C, H, W) the nearest of candidates (N, C, H, W), by pixels."""
    distances = torch.cdist(to_float(images).flatten(1), to_float(candidates).flatten(1))
    return candidates[distances.argmin(1)]


def main():
    config, started = parse_config(Config, {}, __doc__), time.perf_counter()
    device, why = pick_device(config.device)
    print(why)
    dataset, data_dir = config.dataset, config.data_dir

    def evaluator_of(space):
        return Evaluator(space, reference_moments(dataset, space, data_dir))

    imagenet = evaluator_of(imagenet_features(device)) if config.fd else None
    evaluator, unseen = (
        evaluator_of(classifier_features(dataset, device, data_dir, seed=k)) for k in (0, 1)
    )
    evaluator.imagenet = imagenet
    independent = load_classifier(dataset, device, INDEPENDENT, data_dir)
    train = load_dataset(dataset, "train", data_dir).images
    unseen.real = features_of(evenly(train, 10_000), unseen.extractor)
    evaluator.unseen = unseen
    teacher = load_teacher(config.teacher, dataset, device, data_dir)
    samples = sample(teacher, config.n, config.batch, device)
    classes = labels_for(torch.arange(config.n), teacher.net.label_dim, "cpu")
    test = load_dataset(dataset, "test", data_dir)
    last = len(test.images) - 1  # a folder lies class by class: n of it, evenly
    chosen = torch.linspace(0, last, min(config.n, last + 1)).long()
    rows = []
    for name, images, labels in (
        ("samples", samples, classes),
        ("test images", test.images[chosen], test.labels[chosen]),
    ):
        metrics = Metrics(evaluator, len(images))
        for first in range(0, len(images), 250):
            metrics.add(to_float(images[first : first + 250]), first)
        largest, found = probabilities(independent, images, device).max(1)
        row = {"name": name, **metrics.row(), "confident": (largest > 0.9).double().mean().item()}
        if labels is not None:
            row["own_class"] = (found == labels).double().mean().item()
        rows.append(row)
        print(rows[-1])
    minutes = round((time.perf_counter() - started) / 60, 1)
    about = {"dataset": dataset, "sampler": "heun, 35 evaluations", "minutes": minutes}
    about["threads"] = torch.get_num_threads()
    save_json(Path(config.out) / "quality.json", {**about, "results": rows})
    pictures = {}
    for first, few in zip(range(0, 64, 16), samples[:64].split(16)):
        pictures[f"samples {first}-{first + 15}"] = few
        pictures[f"nearest to {first}-{first + 15}"] = nearest(few, train)
    save_rows(Path(config.out) / "nearest.png", pictures)


if __name__ == "__main__":
    cli(main)
