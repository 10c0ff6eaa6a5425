"""GDD, GDD-I: Diffusion Models Are Innate One-Step Generators (Zheng & Yang, arXiv:2405.20750).

Idea: one step of a diffusion model from its highest noise level gives blurred images. GDD
sharpens them by the loss of a GAN, which compares distributions of images, never an image
with one of the teacher's: the teacher gives the initial weights and is not run again. GDD-I
freezes the convolutions: the other 15 % of the weights make a generator of a denoiser.

Loss (official: training/loss.py:238-313). z ~ N(0, I), x0 a real image, F(x, sigma) the
denoiser that is trained, disc_k(x) the logits of the discriminator's head k:
    G(z) = F(sigma_max z, sigma_max)
    L_G = sum_k E softplus(-disc_k(G(z)))
    L_D = sum_k E softplus(-disc_k(x0)) + E softplus(disc_k(G(z)))
    R1  = gamma/2 E |d/dx0 sum_k disc_k(x0)|^2, at every 16th step, with 16 times the weight
Trained are F, or a part of it, and the heads. These see the feature maps of frozen networks,
mixed at random (Projected GAN, arXiv:2111.01007).

Differences from the official code (github.com/Zyriix/GDD, commit e9267e8):
 1. L_G and L_D are sums over the heads of means over images (theirs: in effect sums over a
    GPU's images, because `logits += tensor` on a list adds a tensor's rows one by one; with
    64 images 16 times as large). R1 is alike in both, so their gamma of 1e-4 is 1e-4 / 16.
 2. Frozen networks: VGG16's maps after its poolings (theirs: before, twice as large; DeiT
    instead, except on CIFAR-10); small data: a classifier of a seed that no FID uses.
 3. Mixing of scales: 3x3 convolutions of the coarser map, random with a variance that keeps
    its size (theirs: 1x1 with PyTorch's default initialization and biases, also at the
    coarsest map; then all maps are doubled).
 4. Heads: one width, spectral norm alone, 4 to 16 logits (theirs: widening to 512, batch
    norm too, 16); a logit for each class (theirs: a pretrained embedding of classes).
 5. F has EDM's preconditioning (theirs: consistency models'; the same within 6e-5 at
    sigma_max).
 6. bfloat16 (--precision) for G and disc, not for R1 (theirs: for G alone).
 7. Checkpoints hold disc and both optimizers (theirs: nothing of the discriminator).
 8. A gradient that is not finite stops the run (theirs: replaced by 0 or +-1e5).
 9. Not here: hinge loss, instance-level losses, generators of several steps.
Digits, FID* (n = 1,024) of one evaluation: GDD-I .89, GDD .72 (by an earlier version, whose
L_D took the fakes of L_G); with nothing trained, UniPC on the cosine grid has 1.61 with 3
evaluations, .32 with 4.
    python distributional.py                # digits, GDD-I: 6 min on one CPU core
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

from common.baselines import reference_sampler, untrained_sampler
from common.classifier import ImageNetFeatures, load_classifier
from common.datasets import Stream, load_dataset
from common.diffusion import sigma_grid, with_labels
from common.fid import make_evaluator, measure
from common.machinery.diffusers_teachers import our_name
from common.machinery.options import (
    DistillationOptions, cli, complete, option, parse_config, require,
)
from common.machinery.plots import save_curves, save_rows
from common.machinery.run import Run
from common.solvers import euler
from common.teacher import check_classes, ema_decay, ema_update, load_teacher, save_teacher

# --- the generator


def is_frozen(name, level):
    """Whether --freeze `level` fixes a parameter: these layers, inside residual blocks.

    With "conv" it fixes, for example, enc.32x32_block0.conv1.weight, enc.16x16_down.conv0.bias
    and dec.8x8_in0.proj.weight, and trains enc.32x32_conv.weight, which is in no block, and
    enc.32x32_block0.norm0.weight, enc.16x16_block0.qkv.weight, dec.8x8_block0.skip.weight.
    """
    layers = level.replace("+", "|") + "|proj"  # "proj": the attention's last convolution
    inside = re.search(rf"_(block|up|down|in)\d*\.({layers})", our_name(name))
    return level != "none" and inside is not None


def make_generator(teacher, freeze="none"):
    """A copy of the teacher, of which --freeze fixes a part; in eval mode: no dropout."""
    generator = copy.deepcopy(teacher).eval()
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(not is_frozen(name, freeze))
    return generator


def one_step(generator, sigma_max):
    """The sampler: unit Gaussian noise (B, C, H, W), labels (B,) -> G(noise), one evaluation."""
    return lambda noise, labels: generator(sigma_max * noise, sigma_max, labels)


# --- losses; real, fake: the logits [disc_1, ..., disc_K], each (B, n_k), of x0 and of G(z)


def generator_loss(fake):
    """L_G = sum_k E softplus(-disc_k(G(z)))."""
    return sum(F.softplus(-logits).mean() for logits in fake)


def discriminator_loss(real, fake):
    """L_D = sum_k E softplus(-disc_k(x0)) + E softplus(disc_k(G(z)))."""
    loss = sum(F.softplus(-logits).mean() for logits in real)
    return loss + sum(F.softplus(logits).mean() for logits in fake)


def r1_penalty(disc, x0, labels=None, gamma=1e-4):
    """gamma/2 E |d/dx0 sum_k disc_k(x0)|^2: R1, Mescheder et al. 2018, arXiv:1801.04406."""
    x0 = x0.detach().requires_grad_(True)  # (B, C, H, W)
    total = sum(logits.sum() for logits in disc(x0, labels))
    gradient, = torch.autograd.grad(total, x0, create_graph=True)
    return gamma / 2 * gradient.square().sum((1, 2, 3)).mean()


# --- the discriminator


class Projection(nn.Module):
    """A fixed random mixing of feature maps: over their channels, then over scales.

    From coarse to fine, mixed_i = channel_i map_i + enlarged(scale_i mixed_(i+1)). The random
    matrices have variance 1 / fan-in: mixed maps are about as large as the maps.
    """

    def __init__(self, channels, width):
        super().__init__()
        widths = [width * 2**i for i in range(len(channels))]
        self.channel = nn.ParameterList()
        self.scale = nn.ParameterList()  # one less: nothing is added to the coarsest map
        for i, (c, w) in enumerate(zip(channels, widths)):
            self.channel.append(torch.randn(w, c, 1, 1) / c**0.5)
            if i:
                self.scale.append(torch.randn(w // 2, w, 3, 3) / (9 * w) ** 0.5)
        self.requires_grad_(False)

    def forward(self, maps):
        """[(B, channels[i], h_i, w_i)], finest first -> [(B, width 2^i, h_i, w_i)]."""
        mixed = [F.conv2d(maps[-1], self.channel[-1])]
        for i in reversed(range(len(maps) - 1)):
            x = F.conv2d(maps[i], self.channel[i])
            coarser = F.conv2d(mixed[0], self.scale[i], padding=1)
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
        "conv", "layers of residual blocks that stay the teacher's: conv is GDD-I, none is GDD "
        "(official: train.sh runs both)",
        choices=("none", "conv", "conv+qkv", "conv+qkv+skip"),
    )
    features: str | None = option(
        None, "frozen networks of the discriminator: the data set's classifier; "
        "EfficientNet-Lite0 of ImageNet; imagenet: VGG16 as well (official)",
        choices=("classifier", "lite0", "imagenet"),
    )
    width: int | None = option(
        None, "channels of the finest map after its random mixing (official: 64)", low=1
    )
    images: int | None = option(None, "real images seen in training")
    batch_size: int | None = option(None, "images per step, over all ranks", low=1)
    lr: float | None = option(None, "Adam's learning rate of the generator", above=0)
    lr_d: float | None = option(None, "Adam's learning rate of the discriminator", above=0)
    r1_gamma: float | None = option(
        None, "gamma of R1; 0: no penalty (official: 1e-4, of losses that are larger)", low=0
    )
    r1_every: int = option(16, "steps from one penalty to the next (official: 16)", low=1)
    ema_images: float | None = option(
        None, "half-life of the generator's EMA in images, at most 0.05 of those seen", above=0
    )
    recall: bool = option(True, "precision and recall")
    nfe: tuple[int, ...] = option(
        (1, 2, 4, 8), "network evaluations of the teacher's samplers to compare with", low=1
    )

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        message = f"must be at least one batch, {self.batch_size}"
        require(self.images >= self.batch_size, "images", self.images, message)


# Official: train.sh, training_loop.py, and gamma by difference 1; eval_n: the usual number of
# images for a FID. Small data: chosen here.
_CIFAR10 = dict(
    features="imagenet", width=64, images=5_000_000, batch_size=256, lr=1e-4, lr_d=1e-4,
    r1_gamma=1e-4 / 16, ema_images=5e5, eval_n=50_000, eval_batch=256,
)
_SMALL = dict(_CIFAR10, features="classifier", width=32, lr=3e-4, lr_d=2e-3, r1_gamma=1e-4)
PRESETS = {
    "digits": dict(_SMALL, images=160_000, batch_size=128, eval_n=2048, eval_batch=128),
    "mnist": dict(_SMALL, images=60_000, batch_size=64, eval_n=1024, eval_batch=32),
    "cifar10": dict(_SMALL, images=64_000, batch_size=64, eval_n=1024, eval_batch=64),
    "cifar10-gpu": _CIFAR10,
    "imagenet64": dict(
        _CIFAR10, images=10_000_000, batch_size=512, lr=8e-6, lr_d=4e-5, r1_gamma=1e-4 / 32,
        ema_images=5e7,
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

    # R1 has optimizer steps of its own, one after every 16 others: learning rate and beta2
    # are lowered for these as in StyleGAN2 (arXiv:1912.04958).
    c = config.r1_every / (config.r1_every + bool(config.r1_gamma))
    trained = [p for p in generator.parameters() if p.requires_grad]
    heads = disc.heads.parameters()
    optimizer_g = torch.optim.Adam(trained, config.lr, (0.0, 0.99), fused=True)
    optimizer_d = torch.optim.Adam(heads, config.lr_d * c, (0.0, 0.99**c), fused=True)
    stream = stream or Stream(data, config.batch_size, config.seed)
    sample = one_step(generator, config.sigma_max)
    # Applied at every 16th step, the penalty is 16 times as large.
    loss_r1 = partial(r1_penalty, disc, gamma=config.r1_gamma * config.r1_every)

    def loss_g(noise, labels):
        return generator_loss(disc(sample(noise, labels), labels))

    def loss_d(x0, noise, labels):
        with torch.no_grad():
            fake = sample(noise, labels)  # (B, C, H, W)
        return discriminator_loss(disc(x0, labels), disc(fake, labels))

    def gradients(optimizer, loss_fn, *batch, **precision):
        """The loss of a batch and its gradients.

        In train mode each pass through a spectral norm is a step of its power iteration. Only
        the first micro-batch takes it, so that how a batch is divided changes nothing.
        """

        def micro_batch_loss(*micro_batch):
            loss = loss_fn(*micro_batch)
            disc.heads.eval()
            return loss

        disc.heads.train()
        return run.backward(optimizer, micro_batch_loss, *batch, **precision)

    run.resume(
        generator=generator, ema=ema, discriminator=disc, optimizer_g=optimizer_g,
        optimizer_d=optimizer_d, stream=stream,
    )
    for step in run.steps(config.images // config.batch_size):
        x0, labels = stream.next()  # (B, C, H, W), (B,): fakes' labels too
        noise_g, noise_d = (run.randn(config.batch_size, *shape) for _ in range(2))
        run.loss = {"generator": gradients(optimizer_g, loss_g, noise_g, labels)}
        optimizer_g.step()
        run.loss["discriminator"] = gradients(optimizer_d, loss_d, x0, noise_d, labels)
        optimizer_d.step()
        if config.r1_gamma and step and step % config.r1_every == 0:
            # in float32: a second derivative
            run.loss["R1"] = gradients(optimizer_d, loss_r1, x0, labels, mixed_precision=False)
            optimizer_d.step()
        seen = step * config.batch_size
        ema_update(ema, generator, ema_decay(seen, config.batch_size, config.ema_images))
    return ema


# --- evaluation


def make_samplers(config, teacher, generator):
    """{(name, NFE): sampler(noise, labels) -> x0}: of the teacher, and the generator's step."""

    def ddim(sigmas):
        def sample(noise, labels):
            return euler(with_labels(teacher, labels), sigmas[0].item() * noise, sigmas)

        return sample

    samplers = {}
    for nfe in config.nfe:
        cosine = sigma_grid("cosine", nfe, sigma_max=config.sigma_max)
        samplers["ddim", nfe] = ddim(cosine)
        name, best = untrained_sampler(teacher, config.dataset, nfe, sigma_max=config.sigma_max)
        samplers[name, nfe] = best
    name = "gdd" if config.freeze == "none" else "gdd-i"
    samplers[name, 1] = one_step(generator, config.sigma_max)
    steps = 2 if config.smoke else 18
    evaluations, heun_of_teacher = reference_sampler(teacher, config.sigma_max, steps)
    samplers["teacher", evaluations] = heun_of_teacher
    return samplers


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("distributional", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    networks = feature_networks(config, run.device)  # missing weights fail before training
    evaluator = make_evaluator(config, run.device, unseen=True)
    generator = train(config, run, teacher, networks)
    if run.rank == 0:
        generator.one_step_sigma = config.sigma_max  # refused at any other noise level
        path = run.out / "generator.safetensors"
        save_teacher(path, generator, teacher.arch, teacher.kwargs, config.dataset)
    samplers = make_samplers(config, teacher, generator)
    rows, pictures = measure(run, samplers, teacher.net, evaluator)
    save_rows(run.out / "samples.png", pictures)
    curves = {side: run.logged(side) for side in ("generator", "discriminator")}
    save_curves(run.out / "losses.png", curves, "step", "loss, summed over heads")
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
