"""Small classifiers, features and logits: the loss of feature-space methods, a discriminator's eyes, and the offline FID.

    python -m common.classifier --dataset mnist     # train and cache one; `digits` with seed 0 is in the repository
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.datasets import ASSETS, Stream, evenly, fingerprint, load_dataset, locked, to_float
from common.training import DATASETS, UsageError, cache_dir, cli, load_checkpoint, option, parse_config, pick_device, save_checkpoint

# Chosen here: the width gives features of dimension 4 * width, few enough for a covariance of full rank from 1,000 images.
RECIPES = {
    "digits": {"width": 16, "steps": 600},
    "mnist": {"width": 32, "steps": 500},
    "cifar10": {"width": 32, "steps": 5000},
    "imagenet64": {"width": 64, "steps": 50000},
    "folder": {"width": 32, "steps": 3000},
}
BATCH_SIZE, LR, WEIGHT_DECAY = 128, 5e-3, 0.5


class Stage(nn.Module):
    """A convolution that changes width (and halves the size), then a residual one; smooth activations, so gradients exist everywhere."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        x = F.silu(self.norm0(self.conv0(x)))
        return x + F.silu(self.norm1(self.conv1(x)))


class Classifier(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> features (B, 4 * width), logits (B, num_classes): three stages, global average, one linear layer."""

    def __init__(self, img_resolution, img_channels, num_classes, width=32):
        super().__init__()
        self.arch = {"img_resolution": img_resolution, "img_channels": img_channels, "num_classes": num_classes, "width": width}
        first = 1 if img_resolution <= 16 else 2  # full resolution costs four times the time and is only needed by tiny images
        self.stages = nn.ModuleList([Stage(img_channels, width, first), Stage(width, 2 * width, 2), Stage(2 * width, 4 * width, 2)])
        self.head = nn.Linear(4 * width, num_classes)

    def feature_maps(self, x):
        """The activations behind every stage: (B, width, h, h), (B, 2 * width, h/2, h/2), (B, 4 * width, h/4, h/4), rounded up.

        h is H up to 16 pixels and H/2 above.
        """
        right = (self.arch["img_channels"], self.arch["img_resolution"], self.arch["img_resolution"])
        if x.shape[1:] != right:
            raise ValueError(f"images of shape {tuple(x.shape[1:])} in a classifier of {right} images")
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps

    def forward(self, x):
        features = self.feature_maps(x)[-1].mean((2, 3))  # (B, 4 * width)
        return features, self.head(features)


class ImageNetInput(nn.Module):
    """x (B, 1 or 3, H, W) in [-1, 1] -> (B, 3, 224, 224), what torchvision's ImageNet networks were trained on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x):
        x = F.interpolate(x, size=224, mode="bilinear", align_corners=False)
        return ((x + 1) / 2 - self.mean) / self.std  # grey images get their three channels here


def random_shift(x, most, generator):
    """Every image of x (B, C, H, W) moved by its own -most ... most pixels down and right; black comes in at the border."""
    batch, _, height, width = x.shape
    down, right = torch.randint(0, 2 * most + 1, (2, batch, 1), generator=generator, device=x.device)
    rows, columns = down + torch.arange(height, device=x.device), right + torch.arange(width, device=x.device)  # (B, H), (B, W)
    x = F.pad(x, [most] * 4, value=-1.0).movedim(1, -1)  # (B, H + 2 most, W + 2 most, C)
    return x[torch.arange(batch, device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@torch.no_grad()
def accuracy(classifier, dataset):
    """Share of the images of `dataset` (loaded for the classifier's device) that get their own label."""
    guesses = torch.cat([classifier(to_float(images.to(dataset.device)))[1].argmax(1) for images in dataset.images.split(500)])
    return (guesses == dataset.labels).double().mean().item()


def _with_labels(dataset):
    """A set without labels gets the task of telling the four quarter turns apart (RotNet, arXiv:1803.07728); 50,000 images will do."""
    if dataset.num_classes == 0:
        images = evenly(dataset.images, 50_000).to(dataset.device)
        dataset.labels = torch.arange(4, device=dataset.device).repeat_interleave(len(images))
        dataset.images, dataset.num_classes, dataset.ahead = torch.cat([images.rot90(k, (2, 3)) for k in range(4)]), 4, False
    return dataset


def train_classifier(dataset_name, seed=0, device="cpu", data_dir=None, steps=None):
    """Train one and return (classifier in eval mode and without gradients, accuracy on the test split).

    AdamW, one-cycle rate, shifts by up to an eighth of the width, flips for colour images. The weights are rounded to fp16, as stored.
    """
    recipe = RECIPES[dataset_name]
    steps = steps or recipe["steps"]
    data, test = (_with_labels(load_dataset(dataset_name, split, data_dir, device)) for split in ("train", "test"))
    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator: leave the caller's alone
        torch.manual_seed(seed)
        net = Classifier(data.resolution, data.channels, data.num_classes, recipe["width"])
    net = net.to(device).train()
    stream = Stream(data, BATCH_SIZE, seed, flip=data.channels == 3)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
    for _ in tqdm(range(steps), f"training the {dataset_name} classifier", dynamic_ncols=True, mininterval=0.5):
        x0, labels = stream.next()
        loss = F.cross_entropy(net(random_shift(x0, data.resolution // 8, generator))[1], labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    net = net.half().float().eval().requires_grad_(False)
    share = accuracy(net, test)
    print(f"{dataset_name} classifier (seed {seed}, {steps} steps): {100 * share:.2f} % of {len(test.labels)} "
          f"{'training' if test.split == 'all' else 'held-out'} images right")
    return net, share


def save_classifier(path, net, share):
    """Write a checkpoint: weights in fp16, the architecture and the accuracy."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in net.cpu().state_dict().items()}
    save_checkpoint(path, "classifier", {"arch": net.arch, "accuracy": share, "weights": weights})


def read_classifier(path, device):
    """Read a checkpoint -> Classifier in eval mode and without gradients. Raises UsageError if it is not a classifier."""
    state = load_checkpoint(path)
    if state["fewstep"] != "classifier":
        raise UsageError(f"{path}: holds a {state['fewstep']}, not a classifier")
    net = Classifier(**state["arch"])
    net.load_state_dict(state["weights"])
    return net.to(device).eval().requires_grad_(False)


def load_classifier(dataset_name, device, seed=0, data_dir=None, steps=None):
    """The classifier of a data set: the shipped file (digits, seed 0), else the cached one, else trained now and cached.

    `steps` shortens a training (a smoke test); such a classifier has its own place in the cache.
    """
    if (dataset_name, seed) == ("digits", 0):
        return read_classifier(ASSETS / "digits-classifier.pt", device)
    short = f"-steps{steps}" if steps else ""
    path = cache_dir() / f"{dataset_name}{fingerprint(dataset_name, data_dir)}-classifier-seed{seed}{short}.pt"
    with locked(path):
        if not path.exists():
            save_classifier(path, *train_classifier(dataset_name, seed, device, data_dir, steps))
    return read_classifier(path, device)


@dataclass
class Config:
    dataset: str = option("digits", "what to classify", choices=DATASETS)
    data_dir: str | None = option(None, "where the data lies")
    seed: int = option(0, "initialisation, order of the images, shifts")
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(None, "write it here, not into the cache")


def main():
    config = parse_config(Config, {}, "Train and keep a classifier.")
    device, why = pick_device(config.device)
    print(why)
    if config.out:
        save_classifier(Path(config.out), *train_classifier(config.dataset, config.seed, device, config.data_dir))
    else:
        load_classifier(config.dataset, device, config.seed, config.data_dir)


if __name__ == "__main__":
    cli(main)
