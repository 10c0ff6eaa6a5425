"""GDD, GDD-I: Diffusion Models Are Innate One-Step Generators (Zheng & Yang, arXiv:2405.20750).

Idea: one step of a diffusion model from its highest noise level gives blurred images. GDD
sharpens them by a GAN's loss, which matches the samples' distribution to the data's. The
teacher gives the first weights and never runs; GDD-I freezes its convolutions.

Loss (theirs: loss.py:238-313), z ~ N(0, I), real images x0, heads k of the discriminator:
    G(z) = D(sigma_max z, sigma_max), D: the denoiser
    L_G = sum_k E softplus(-disc_k(G(z)))
    L_D = sum_k E softplus(-disc_k(x0)) + E softplus(disc_k(G(z)))
    R1  = gamma/2 E |d/dx0 sum_k disc_k(x0)|^2, 16 times at every 16th step
Heads see frozen networks' features, mixed at random (Projected GAN, arXiv:2111.01007).

Differences from the official code (github.com/Zyriix/GDD, commit e9267e8):
 1. L_D takes the fake images of L_G, made before G's update (theirs: new ones).
 2. Frozen: vgg16_bn and efficientnet_b0 (theirs: vgg16_bn or DeiT, efficientnet_lite0); on
    small data: a classifier, of another seed than those of the FIDs.
 3. Heads: spectral norm alone (Projected GAN: batch norm too); the logit of the image's
    class (theirs: a pretrained embedding).
 4. Checkpoints hold all of disc (theirs: without the random projections).
 5. A gradient that is not finite stops the run (theirs: replaced by 0 or +-1e5).
 6. Not here: hinge loss, teachers' targets, several steps.
Digits: FID .87 (GDD-I), .72 (GDD); DDIM with 10: 1.73. More: RESULTS.md
    python distributional.py                # digits, GDD-I: 5 min on one CPU core
    python distributional.py --freeze none  # GDD: all is trained
    python distributional.py --dataset cifar10 --teacher edm-cifar10-32x32-uncond-ve
"""
import copy
import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from common.classifier import ImageNetFeatures, load_classifier
from common.datasets import Stream, load_dataset
from common.diffusion import Denoiser, sigma_grid, with_labels
from common.fid import make_evaluator, measure
from common.machinery.diffusers_teachers import our_name
from common.machinery.options import (
    DistillationOptions, cli, complete, option, parse_config, require,
)
from common.machinery.plots import save_curves, save_rows
from common.machinery.run import Run
from common.solvers import euler, heun
from common.teacher import check_classes, ema_decay, ema_update, load_teacher

# --- the generator


class Generator(Denoiser):
    """D preconditioned as in consistency models: the identity at sigma_min."""
    sigma_min = 0.002

    def coefficients(self, sigma):
        total = (sigma**2 + self.sigma_data**2).sqrt()
        above = sigma - self.sigma_min
        c_skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return c_skip, above * self.sigma_data / total, 1 / total


def is_frozen(name, level):
    """Whether --freeze `level` fixes a parameter: these layers, inside residual blocks."""
    layers = level.replace("+", "|") + "|proj"
    inside = re.search(rf"_(block|up|down|in)\d*\.({layers})", our_name(name))
    return level != "none" and inside is not None


def make_generator(teacher, freeze="none"):
    """A copy of the teacher, EDM's as a Generator; in eval mode: no dropout."""
    generator = copy.deepcopy(teacher)
    if type(teacher) is Denoiser:
        generator = Generator(generator.net, teacher.sigma_data)
    for name, parameter in generator.eval().named_parameters():
        parameter.requires_grad_(not is_frozen(name, freeze))
    return generator


def one_step(generator, sigma_max):
    """The sampler: unit Gaussian noise (B, C, H, W), labels (B,) -> G(noise)."""
    return lambda noise, labels: generator(sigma_max * noise, sigma_max, labels)


# --- losses; real, fake: logits [(B, n_k)] of x0, G(z)


def generator_loss(fake):
    """L_G = sum_k E softplus(-disc_k(G(z)))."""
    return sum(F.softplus(-logits).mean() for logits in fake)


def discriminator_loss(real, fake):
    """L_D = sum_k E softplus(-disc_k(x0)) + E softplus(disc_k(G(z)))."""
    loss = sum(F.softplus(-logits).mean() for logits in real)
    return loss + sum(F.softplus(logits).mean() for logits in fake)


def r1_penalty(disc, x0, labels=None, gamma=1e-4):
    """gamma/2 E |d/dx0 sum_k disc_k(x0)|^2: R1, Mescheder et al. 2018."""
    x0 = x0.detach().requires_grad_(True)  # (B, C, H, W)
    total = sum(logits.sum() for logits in disc(x0, labels))
    gradient, = torch.autograd.grad(total, x0, create_graph=True)
    return gamma / 2 * gradient.square().sum((1, 2, 3)).mean()


# --- the discriminator


class Projection(nn.Module):
    """A fixed random mixing of feature maps over channels, then over scales."""

    def __init__(self, channels, width):
        super().__init__()
        for i, c in enumerate(channels):
            w = width * 2**i
            self.register_buffer(f"channel{i}", torch.randn(w, c, 1, 1) / c**0.5)
            if i:
                self.register_buffer(f"scale{i}", torch.randn(w // 2, w, 3, 3) / (9 * w) ** 0.5)

    def forward(self, maps):
        """[(B, channels[i], h_i, w_i)], finest first -> [(B, width 2^i, h_i, w_i)]."""
        mixed = []
        for i in reversed(range(len(maps))):  # from coarse to fine
            x = F.conv2d(maps[i], getattr(self, f"channel{i}"))
            if mixed:
                coarser = F.conv2d(mixed[0], getattr(self, f"scale{i + 1}"), padding=1)
                x = x + F.interpolate(coarser, size=x.shape[-2:], mode="bilinear")
            mixed.insert(0, x)
        return mixed


class Head(nn.Module):
    """(B, C, h, w) -> logits (B, n) of the image's class at each place of up to 4 x 4."""

    def __init__(self, channels, side, num_classes):
        super().__init__()
        self.num_classes = num_classes

        def conv(*args):
            return spectral_norm(nn.Conv2d(channels, *args))

        layers = []
        while side > 4:
            layers += [conv(channels, 4, 2, 1), nn.LeakyReLU(0.2)]
            side //= 2
        layers += [conv(channels, 3, 1, 1), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.out = conv(max(num_classes, 1), 1)

    def forward(self, x, labels=None):
        logits = self.out(self.body(x)).flatten(2)  # (B, classes or 1, n)
        if self.num_classes:
            return logits[torch.arange(len(x), device=x.device), labels]
        return logits[:, 0]


class Discriminator(nn.Module):
    """Frozen networks -> random projections -> a trained head for each network and scale."""

    def __init__(self, networks, img_shape, width, num_classes=0):
        super().__init__()
        self.networks = nn.ModuleList(networks)  # always in eval mode
        example = torch.zeros(1, *img_shape, device=next(networks[0].parameters()).device)
        self.projections = nn.ModuleList()
        for network in networks:
            channels = [m.shape[1] for m in network.feature_maps(example)]
            self.projections.append(Projection(channels, width).to(example.device))
        heads = [Head(*m.shape[1:3], num_classes) for m in self.features(example)]
        self.heads = nn.ModuleList(heads)

    def features(self, x):
        """x (B, C, H, W) -> [(B, c_k, h_k, w_k)], for head k."""
        maps = []
        for network, projection in zip(self.networks, self.projections):
            maps += projection(network.feature_maps(x))
        return maps

    def forward(self, x, labels=None):
        """x (B, C, H, W) -> [disc_k(x) (B, n_k)], high for real images."""
        return [head(m, labels) for head, m in zip(self.heads, self.features(x))]


def feature_networks(config, device):
    """The discriminator's frozen networks: EfficientNet-Lite0 and VGG16, or a classifier."""
    if config.features == "classifier":
        steps = config.classifier_steps  # seed 2: FIDs use 0 and 1
        return [load_classifier(config.dataset, device, 2, config.data_dir, steps)]
    names = ["lite0"] if config.features == "lite0" else ["vgg16_bn", "lite0"]
    instead = "use --features classifier"
    return [ImageNetFeatures(n, f"features {config.features}", instead).to(device) for n in names]


# --- options


@dataclass
class Config(DistillationOptions):
    freeze: str = option(
        "conv", "layers of residual blocks that stay the teacher's (official: conv); none: GDD",
        choices=("none", "conv", "conv+qkv", "conv+qkv+skip"),
    )
    features: str | None = option(
        None, "the discriminator's frozen networks", choices=("classifier", "imagenet", "lite0")
    )
    width: int | None = option(None, "projected channels, finest scale (official: 64)", low=1)
    images: int | None = option(None, "real images seen in training")
    batch_size: int | None = option(None, "images per step, over all ranks", low=1)
    lr: float | None = option(None, "Adam's rate of the generator", above=0)
    lr_d: float | None = option(None, "Adam's rate of the discriminator", above=0)
    r1_gamma: float = option(1e-4, "gamma of R1, 0: no penalty (official)", low=0)
    r1_every: int = option(16, "steps from one penalty to the next (official)", low=1)
    ema_images: float | None = option(
        None, "EMA's half-life in images, at most 0.05 of those seen", above=0
    )
    recall: bool = option(True, "precision and recall")
    nfe: tuple[int, ...] = option((1, 5, 10), "evaluations of the teacher's DDIM", low=1)

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        at_least = f"must be at least one batch, {self.batch_size}"
        require(self.images >= self.batch_size, "images", self.images, at_least)


# Official: train.sh, training_loop.py; eval_n: the usual FID. Small data: chosen here.
_CIFAR10 = dict(
    features="imagenet", width=64, images=5_000_000, batch_size=256, lr=1e-4, lr_d=1e-4,
    ema_images=5e5, eval_n=50_000, eval_batch=256,
)
_SMALL = dict(_CIFAR10, features="classifier", width=32, lr=3e-4, lr_d=2e-3)
PRESETS = {
    "digits": dict(_SMALL, images=160_000, batch_size=128, eval_n=2048, eval_batch=128),
    "mnist": dict(_SMALL, images=60_000, batch_size=64, eval_n=1024, eval_batch=32),
    "cifar10": _CIFAR10,
    "imagenet64": dict(
        _CIFAR10, images=10_000_000, batch_size=512, lr=8e-6, lr_d=4e-5, ema_images=5e7
    ),
    "folder": dict(_SMALL, images=20_000, batch_size=32, eval_n=500, eval_batch=50),
    "folder-gpu": dict(_CIFAR10, images=10_000_000, lr=2e-5, lr_d=4e-5, eval_n=10_000),
}
SMOKE = dict(features="classifier", width=8, images=64, batch_size=8, eval_n=16, eval_batch=16)


# --- training


def train(config, run=None, teacher=None, networks=None, stream=None):
    """Train a generator against a discriminator; return the generator's EMA."""
    run = run or Run("distributional", config)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    check_classes(config, teacher, data)
    generator = make_generator(teacher, config.freeze)
    ema = copy.deepcopy(generator).requires_grad_(False)
    shape, classes = teacher.net.img_shape, teacher.net.label_dim
    networks = networks or feature_networks(config, run.device)
    disc = Discriminator(networks, shape, config.width, classes)
    disc = disc.to(run.device, memory_format=torch.channels_last)
    run.prepare(generator.net)

    # StyleGAN2's correction for the steps of R1
    c = config.r1_every / (config.r1_every + bool(config.r1_gamma))
    trained = [p for p in generator.parameters() if p.requires_grad]
    heads = disc.heads.parameters()
    optimizer_g = torch.optim.Adam(trained, config.lr, (0.0, 0.99), fused=True)
    optimizer_d = torch.optim.Adam(heads, config.lr_d * c, (0.0, 0.99**c), fused=True)
    stream = stream or Stream(data, config.batch_size, config.seed)
    sample = one_step(generator, config.sigma_max)
    loss_r1 = partial(r1_penalty, disc, gamma=config.r1_gamma * config.r1_every)
    fakes = []  # G(z), in parts

    def loss_g(noise, labels):
        fake = sample(noise, labels)  # (B, C, H, W)
        fakes.append(fake.detach())
        return generator_loss(disc(fake, labels))

    def loss_d(x0, fake, labels):
        return discriminator_loss(disc(x0, labels), disc(fake, labels))

    def update(optimizer, loss_fn, *batch, **precision):
        """One Adam step. In train mode spectral norm iterates: in the first part of a batch."""

        def part_loss(*part):
            loss = loss_fn(*part)
            disc.heads.eval()
            return loss

        disc.heads.train()
        loss = run.backward(optimizer, part_loss, *batch, **precision)
        optimizer.step()
        return loss

    run.resume(
        generator=generator, ema=ema, discriminator=disc, optimizer_g=optimizer_g,
        optimizer_d=optimizer_d, stream=stream,
    )
    for step in run.steps(config.images // config.batch_size):
        x0, labels = stream.next()  # (B, C, H, W), (B,): fakes' labels too
        noise = run.randn(config.batch_size, *shape)
        run.loss = {
            "generator": update(optimizer_g, loss_g, noise, labels),
            "discriminator": update(optimizer_d, loss_d, x0, torch.cat(fakes), labels),
        }
        fakes.clear()
        if config.r1_gamma and step and step % config.r1_every == 0:
            # in float32: a second derivative
            run.loss["R1"] = update(optimizer_d, loss_r1, x0, labels, mixed_precision=False)
        seen = step * config.batch_size
        ema_update(ema, generator, ema_decay(seen, config.batch_size, config.ema_images))
    return ema


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("distributional", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    networks = feature_networks(config, run.device)  # may be missing: first
    evaluator = make_evaluator(config, run.device, unseen=True)
    generator = train(config, run, teacher, networks)
    if teacher.arch == "diffusers" and run.rank == 0:
        generator.save(run.out / "generator")

    def sample(solver, sigmas, noise, labels):
        return solver(with_labels(teacher, labels), config.sigma_max * noise, sigmas)

    grid = partial(sigma_grid, "edm", sigma_max=config.sigma_max)
    name = "gdd" if config.freeze == "none" else "gdd-i"
    samplers = {("ddim", nfe): partial(sample, euler, grid(nfe)) for nfe in config.nfe}
    samplers[name, 1] = one_step(generator, config.sigma_max)
    n = 1 if config.smoke else 17  # steps, then one to 0
    samplers["teacher", 2 * n + 1] = partial(sample, heun, F.pad(grid(n), (0, 1)))
    rows, pictures = measure(run, samplers, teacher.net, evaluator)
    save_rows(run.out / "samples.png", pictures)
    curves = {side: run.logged(side) for side in ("generator", "discriminator")}
    save_curves(run.out / "losses.png", curves, "step", "loss, summed over heads")
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
