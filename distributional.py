"""GDD and GDD-I: Diffusion Models Are Innate One-Step Generators (Zheng & Yang 2024, arXiv:2405.20750; ICML 2025 as D2O and D2O-F).

Idea: a diffusion model asked once, at its highest noise level, already is a generator, only a blurred one. Do not make it follow its
teacher's trajectories, which a student may not be able to: make the *distribution* of its samples that of the data, as a GAN does,
with the teacher for its first weights. The teacher never runs. Its convolutions are good as they are and may stay frozen (GDD-I):
what is trained are norms, noise embedding, attention's queries, keys and values, skips, first and last layer.

Loss: G(z) = D_theta(sigma_max z, sigma_max), z ~ N(0, I); k: heads of the discriminator D, on fixed features F_k of the image x
    L_G = sum_k E softplus(-D_k(F_k(G(z))))
    L_D = sum_k E softplus(-D_k(F_k(x))) + E softplus(D_k(F_k(G(z)))),  and at every 16th step 16 gamma/2 E |d/dx sum_k D_k(F_k(x))|^2
    F_k: maps of frozen networks, mixed at random over channels and scales (Projected GAN); x: real images, not the teacher's.

Differences from the paper and its official code (github.com/Zyriix/GDD, commit e9267e8):
 1. D learns from the very images that G was just judged by, made before G's update (StyleGAN2's loop, the form of theirs: from fresh
    ones). It saves one pass of G in every step.
 2. Frozen networks: vgg16_bn and efficientnet_b0 of torchvision (theirs: vgg16_bn or DeiT, and efficientnet_lite0); --features
    classifier: the data set's own, of a training seed that neither FID uses, so that every number printed is in a space D never saw.
 3. Heads: spectral norm alone (Projected GAN: batch norm too); the logit of the image's own class (theirs: a pretrained embedding).
 4. All of D is in the checkpoint, random projections included (theirs are drawn again: D cannot resume).
 5. A gradient that is not finite stops the run by name, with the last good checkpoint kept (theirs: replaced by 0 or +-1e5).
 6. Frozen is frozen (theirs: 16 of the 144 tensors get gradients in every step, which are then not used).
 7. Not here: hinge loss, teachers' targets and several steps (in theirs these cannot run).
Measured: digits, FID of 2,048 images in the features of the shipped classifier / of one that no loss has seen (seed 1), precision and
    recall in the latter; mean of 3 training seeds; 160,000 images; 4.6 minutes in all on *one* CPU core, 3.4 (GDD: 4.2) to train
    teacher, DDIM, 5 evaluations 5.96 / 6.54, .73, .59; 10 evaluations 1.29 / 1.41, .86, .83; Heun, 35: 0.05 / 0.04, .92, .91
    GDD    1 evaluation: 0.59 +- 0.09 / 0.62 +- 0.10, .84, .62 (a quarter of the images: 1.03, half: 0.88)
    GDD-I  1 evaluation: 0.69 +- 0.10 / 0.69 +- 0.12, .78, .75 (1.45, 0.85)
    Below DDIM with 10 in FID, not in precision and recall. From random weights GDD ends at 61 / 68. GDD-I / GDD, one update of the
    generator: 0.80 of the time here; 0.62 of the time and 0.59 of the memory with the NCSN++ of CIFAR-10 (tests/bench.py).
    python distributional.py                       # digits, GDD-I
    python distributional.py --freeze none         # GDD: everything is trained
    python distributional.py --dataset cifar10 --teacher edm-cifar10-32x32-uncond-ve     # one GPU
"""
import copy
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from common.classifier import ImageNetInput, load_classifier
from common.datasets import Stream, load_dataset
from common.diffusion import Denoiser, sigma_grid, with_labels
from common.fid import make_judge, measure
from common.plots import save_curves, save_heatmap, save_rows
from common.solvers import euler, heun
from common.teacher import ARCHS, check_classes, load_teacher
from common.training import (SCORES, Run, TrainingOptions, UsageError, accumulate, autocast, average_gradients, cli, ema_decay, ema_update,
                             fill_from_presets, option, parse_config, prepare, require, sum_over_ranks, table)
from common.unet import Block

FREEZE = {"none": "", "conv": "conv|proj", "conv+qkv": "conv|proj|qkv", "conv+qkv+skip": "conv|proj|qkv|skip"}


@dataclass
class Config(TrainingOptions):
    teacher: str | None = option(None, "teacher checkpoint (default: the data set's own)")
    freeze: str = option("conv", "what residual blocks keep of the teacher; none: GDD, else GDD-I (official: conv)", choices=tuple(FREEZE))
    init: str = option("teacher", "the generator's first weights", choices=("teacher", "random"))
    features: str | None = option(None, "the discriminator's frozen networks", choices=("classifier", "imagenet"))
    width: int | None = option(None, "channels of the random projection at the finest scale, twice as many at each coarser (official: 64)")
    images: int | None = option(None, "real images seen in training (official)")
    batch_size: int | None = option(None, "images per step, over all ranks (official)")
    lr: float | None = option(None, "Adam's learning rate of the generator (official)")
    lr_d: float | None = option(None, "Adam's learning rate of the discriminator (official)")
    r1_gamma: float = option(1e-4, "weight of the gradient penalty on real images, 0: none (official)")
    r1_every: int = option(16, "the penalty is taken at every 16th step, 16 times as strong (official)")
    ema_images: float | None = option(None, "half-life of the generator's EMA in images, at most 0.05 of the images seen (official)")
    recall: bool = option(True, "precision and recall: keeps the features of all images")
    sigma_max: float = option(80.0, "noise level at which the network generates (official)")
    nfe: tuple[int, ...] = option((1, 5, 10), "evaluations of the teacher's DDIM rows (the generator takes one)")

    def __post_init__(self):
        fill_from_presets(self, PRESETS, SMOKE)
        self.nfe = (self.nfe,) if isinstance(self.nfe, int) else tuple(dict.fromkeys(self.nfe))
        for name in ("width", "batch_size", "r1_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("lr", "lr_d", "ema_images"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        require(self.r1_gamma >= 0, "r1_gamma", self.r1_gamma, "must not be negative")
        require(self.images >= self.batch_size, "images", self.images, f"must be at least one batch, {self.batch_size}")
        require(0.002 < self.sigma_max < float("inf"), "sigma_max", self.sigma_max, "must be above 0.002, where DDIM ends, and finite")
        require(min(self.nfe, default=0) >= 1, "nfe", self.nfe, "at least 1 network evaluation is needed")
        for name, allowed in (("freeze", FREEZE), ("init", ("teacher", "random")), ("features", ("classifier", "imagenet"))):
            require(getattr(self, name) in allowed, name, getattr(self, name), f"unknown, choose from {', '.join(allowed)}")


# Official: train.sh (images, batch, learning rates, EMA), training_loop.py; eval_n 50k: the usual FID. Digits and MNIST were chosen here.
_CIFAR10 = dict(features="imagenet", width=64, images=5_000_000, batch_size=256, lr=1e-4, lr_d=1e-4, ema_images=5e5, eval_n=50_000,
                eval_batch=256)
PRESETS = {
    "digits": {**_CIFAR10, "features": "classifier", "width": 32, "images": 160_000, "batch_size": 128, "lr": 3e-4, "lr_d": 2e-3,
               "eval_n": 2048, "eval_batch": 128},
    "mnist": {**_CIFAR10, "features": "classifier", "images": 1_000_000, "lr_d": 5e-4, "eval_n": 10_000},
    "cifar10": _CIFAR10,
    "imagenet64": {**_CIFAR10, "images": 10_000_000, "batch_size": 512, "lr": 8e-6, "lr_d": 4e-5, "ema_images": 5e7},
    "folder": {**_CIFAR10, "images": 10_000_000, "lr": 2e-5, "lr_d": 4e-5, "eval_n": 10_000},
}
SMOKE = dict(features="classifier", width=8, images=64, batch_size=8, eval_n=16, eval_batch=16)


# ---------------------------------------------------------------------------------------------------------------- the generator

class Generator(Denoiser):
    """G(z) = D(sigma_max z, sigma_max), a teacher's network asked once; preconditioned as consistency models: the identity at sigma_min."""
    sigma_min = 0.002

    def coefficients(self, sigma):
        c_skip = self.sigma_data**2 / ((sigma - self.sigma_min) ** 2 + self.sigma_data**2)
        c_out = (sigma - self.sigma_min) * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        return c_skip, c_out, (sigma**2 + self.sigma_data**2).rsqrt()


def is_frozen(name, level):
    """Whether --freeze `level` fixes a parameter: some kinds of layers, but only those inside the residual blocks."""
    return level != "none" and re.search(rf"_(block|up|down|in)\d*\.({FREEZE[level]})", name) is not None


def make_generator(teacher, freeze="none", init="teacher"):
    """A Generator that starts from a teacher; what is frozen has no gradient. In eval mode: no dropout."""
    net = ARCHS[teacher.arch](**teacher.kwargs) if init == "random" else copy.deepcopy(teacher.net)
    generator = Generator(net, teacher.sigma_data).eval()
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(not is_frozen(name, freeze))
    return generator


# ------------------------------------------------------------------------------------------------------------- the discriminator

class ImageNetFeatures(nn.Module):
    """A torchvision network trained on ImageNet, cut where the size halves: images in [-1, 1] -> maps at strides 4, 8, 16, 32 of 224."""

    CUTS = {"vgg16_bn": (14, 24, 34, 44), "efficientnet_b0": (3, 4, 6, 8)}

    def __init__(self, name):
        super().__init__()
        import torchvision
        weights = torchvision.models.get_model_weights(name).DEFAULT
        try:
            features = torchvision.models.get_model(name, weights=weights).features
        except (OSError, RuntimeError) as error:  # no connection; a damaged file
            raise UsageError(f"--features imagenet: no weights of {name} ({' '.join(str(error).split())}); fetch {weights.url} by hand and "
                             f"put it into {torch.hub.get_dir()}/checkpoints, or use --features classifier") from None
        cuts = self.CUTS[name]
        self.stages = nn.ModuleList(features[a:b] for a, b in zip((0, *cuts), cuts))
        self.input = ImageNetInput()
        self.eval().requires_grad_(False)

    def feature_maps(self, x):
        x, maps = self.input(x), []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps


class Projection(nn.Module):
    """Projected GAN's fixed random mixing of feature maps, over channels, then from coarse to fine over scales. Buffers: never trained."""

    def __init__(self, channels, width):
        super().__init__()
        self.widths = [width * 2**i for i in range(len(channels))]
        for i, (c, w) in enumerate(zip(channels, self.widths)):
            self.register_buffer(f"channel{i}", torch.randn(w, c, 1, 1) / c**0.5)
            if i:
                self.register_buffer(f"scale{i}", torch.randn(self.widths[i - 1], w, 3, 3) / (9 * w) ** 0.5)

    def forward(self, maps):
        """maps [(B, channels[i], h_i, w_i)], finest first -> [(B, widths[i], h_i, w_i)]."""
        mixed, coarser = [], None
        for i, x in reversed(list(enumerate(maps))):
            x = F.conv2d(x, getattr(self, f"channel{i}"))
            if coarser is not None:
                coarser = F.conv2d(coarser, getattr(self, f"scale{i + 1}"), padding=1)
                x = x + F.interpolate(coarser, size=x.shape[-2:], mode="bilinear", align_corners=False)
            mixed.insert(0, coarser := x)
        return mixed


class Head(nn.Module):
    """One scale's judge: (B, C, h, w) -> logits (B, n), one per place of a grid of at most 4 x 4; with classes, that of the image's own."""

    def __init__(self, channels, side, num_classes):
        super().__init__()
        layers = []
        while side > 4:
            layers += [spectral_norm(nn.Conv2d(channels, channels, 4, 2, 1)), nn.LeakyReLU(0.2)]
            side //= 2
        layers += [spectral_norm(nn.Conv2d(channels, channels, 3, 1, 1)), nn.LeakyReLU(0.2)]
        self.body, self.out = nn.Sequential(*layers), spectral_norm(nn.Conv2d(channels, max(num_classes, 1), 1))
        self.num_classes = num_classes

    def forward(self, x, labels=None):
        logits = self.out(self.body(x)).flatten(2)  # (B, classes or 1, n)
        return logits[torch.arange(len(x), device=x.device), labels] if self.num_classes else logits[:, 0]


class Discriminator(nn.Module):
    """Projected GAN (Sauer et al. 2021, arXiv:2111.01007): frozen networks -> random projections -> a small head per network and scale.

    Networks and projections are in the state dict: a resumed run has the same eyes. No call of `train()`: networks stay in eval mode.
    """

    def __init__(self, networks, img_shape, width, num_classes=0):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        example = torch.zeros(1, *img_shape, device=next(networks[0].parameters()).device)
        maps = [network.feature_maps(example) for network in networks]
        self.projections = nn.ModuleList(Projection([m.shape[1] for m in ms], width) for ms in maps)
        self.heads = nn.ModuleList(Head(w, m.shape[-1], num_classes) for ms, p in zip(maps, self.projections) for m, w in zip(ms, p.widths))

    def forward(self, x, labels=None):
        """x (B, C, H, W) -> a list of logits (B, n_k), one entry per head; high for images taken to be real."""
        maps = [m for network, projection in zip(self.networks, self.projections) for m in projection(network.feature_maps(x))]
        return [head(m, labels) for head, m in zip(self.heads, maps)]


def feature_networks(config, device):
    if config.features == "imagenet":
        return [ImageNetFeatures(name).to(device) for name in ImageNetFeatures.CUTS]
    return [load_classifier(config.dataset, device, seed=2, data_dir=config.data_dir, steps=5 if config.smoke else None)]


# -------------------------------------------------------------------------------------------------------------------- the losses

def generator_loss(fake):
    """sum over heads k of E softplus(-D_k(G(z))); `fake` is what the discriminator says of G(z)."""
    return sum(F.softplus(-logits).mean() for logits in fake)


def discriminator_loss(real, fake):
    """sum over heads k of E softplus(-D_k(x)) + E softplus(D_k(G(z)))."""
    return sum(F.softplus(-logits).mean() for logits in real) + sum(F.softplus(logits).mean() for logits in fake)


def r1_penalty(discriminator, x0, labels=None, gamma=1e-4):
    """gamma/2 E |d/dx of the sum of all logits|^2 on real images: R1 (Mescheder et al. 2018), to the pixels, through the features."""
    x0 = x0.detach().requires_grad_(True)
    gradient, = torch.autograd.grad(sum(logits.sum() for logits in discriminator(x0, labels)), x0, create_graph=True)
    return gamma / 2 * gradient.square().sum((1, 2, 3)).mean()


# ------------------------------------------------------------------------------------------------------------------------ training

class Player:
    """One side of the game: what it trains, its Adam, and for every tensor the first step whose gradient was not finite (-1: none)."""

    def __init__(self, net, lr, beta2=0.99):
        device = next(net.parameters()).device
        self.trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.Adam(self.trained.values(), lr, (0.0, beta2), fused=True)
        self.broken = torch.full((len(self.trained),), -1, device=device)

    def update(self, loss_of, batch, step, at_most=None):
        """One Adam step, of the trained tensors alone, down a mean over a batch, which it returns. The device is not waited for."""
        parameters = list(self.trained.values())
        self.optimizer.zero_grad(set_to_none=False)  # R1 has no gradient for the last biases
        loss = accumulate(loss_of, batch, at_most, inputs=parameters)
        average_gradients(parameters)
        largest = torch.stack(torch._foreach_norm([p.grad for p in parameters], float("inf")))
        self.broken = torch.where((self.broken < 0) & ~largest.isfinite(), step, self.broken)
        self.optimizer.step()
        return loss

    def faults(self):
        """[(name of a tensor, the first step whose gradient of it was not finite)]."""
        return [(name, step) for name, step in zip(self.trained, self.broken.tolist()) if step >= 0]


class History:
    """Losses of every step, and rows and pictures at a few of them: part of the checkpoint."""

    def __init__(self, steps, device):
        self.losses, self.rows, self.pictures = torch.zeros(steps, 2, device=device), [], {}

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, state):
        self.losses.copy_(state["losses"])
        self.rows, self.pictures = state["rows"], state["pictures"]


def one_step(generator, sigma_max):
    """The generator as a sampler for `common.fid.measure`: unit noise, labels -> x0."""
    return lambda noise, labels: generator(sigma_max * noise, sigma_max, labels)


def train(config, run=None, teacher=None, judge=None):
    """Train a generator against a discriminator; return the EMA of the generator and the History. `judge` measures on the way."""
    run = run or Run("distributional", config)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    shape, label_dim = teacher.net.img_shape, teacher.net.label_dim
    check_classes(config, teacher, data)
    per_rank, mine = run.rows(config.batch_size)
    generator = make_generator(teacher, config.freeze, config.init).to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(generator).requires_grad_(False)
    discriminator = Discriminator(feature_networks(config, run.device), shape, config.width, label_dim)
    discriminator = discriminator.to(run.device, memory_format=torch.channels_last)
    prepare(config, generator.net)
    correction = config.r1_every / (config.r1_every + 1) if config.r1_gamma else 1  # of StyleGAN2: one update in 17 is R1's
    g, d = Player(generator, config.lr), Player(discriminator, config.lr_d * correction, 0.99**correction)
    stream = Stream(data, per_rank, config.seed, False, run.rank, run.world)
    steps = config.images // config.batch_size
    history = History(steps, run.device)
    run.say(f"generator: {sum(p.numel() for p in g.trained.values()):,} of {sum(p.numel() for p in generator.parameters()):,} parameters "
            f"are trained; discriminator: {sum(p.numel() for p in d.trained.values()):,} in {len(discriminator.heads)} heads")

    def look(done):
        """What the EMA has learned after `done` steps: a row and a picture."""
        sampler = {(f"{done} steps", 1): one_step(ema, config.sigma_max)}
        (row,), pictures = measure(sampler, config, shape, run.device, judge, label_dim)
        history.pictures[f"{done * config.batch_size:,}"] = pictures[f"{done} steps 1"]
        if judge:
            history.rows.append({"images": done * config.batch_size, **row})
            run.log(what="measured", **history.rows[-1])

    fakes = []  # what the generator made for its own update, parts of the batch; the discriminator's next

    def loss_of_g(noise, labels):
        with autocast(run.device):
            fake = generator(config.sigma_max * noise, config.sigma_max, labels)
            fakes.append(fake.detach())
            return generator_loss(discriminator(fake, labels))

    def loss_of_d(x0, fake, labels):
        with autocast(run.device):
            return discriminator_loss(discriminator(x0, labels), discriminator(fake, labels))

    def loss_of_r1(x0, labels):  # in float32: it is a second derivative
        return config.r1_every * r1_penalty(discriminator, x0, labels, config.r1_gamma)

    def play(player, loss_of, batch, step):
        def first_iterates(*part):
            loss = loss_of(*part)
            discriminator.heads.eval()  # spectral norm: no power iteration for further parts of the batch
            return loss

        discriminator.heads.train()
        return player.update(first_iterates, batch, step, config.batch_per_gpu)

    parts = {"generator": generator, "ema": ema, "discriminator": discriminator, "optimizer_g": g.optimizer, "optimizer_d": d.optimizer,
             "stream": stream, "history": history}
    first = run.restore(parts)
    looks = {max(1, round(steps * part)) for part in (1 / 16, 1 / 4, 1 / 2, 1)}
    if first == 0:
        look(0)
    try:
        for step in run.steps(first, steps, parts):
            x0, labels = stream.next()
            noise = torch.randn(config.batch_size, *shape, device=run.device)[mine]
            labels = labels if label_dim else None  # fake images get the classes of the real ones
            loss_g = play(g, loss_of_g, (noise, labels), step)
            loss_d = play(d, loss_of_d, (x0, torch.cat(fakes), labels), step)
            fakes.clear()
            if config.r1_gamma and step and step % config.r1_every == 0:
                play(d, loss_of_r1, (x0, labels), step)
            ema_update(ema, generator, ema_decay(step * config.batch_size, config.batch_size, config.ema_images))
            history.losses[step] = sum_over_ranks(torch.stack([loss_g, loss_d]).float()) / run.world
            good = (g.broken < 0).all() & (d.broken < 0).all()
            run.loss = torch.where(good, history.losses[step, 0], torch.nan)  # read now and then, and before every save
            if step + 1 in looks:
                look(step + 1)
    except UsageError as error:
        faults = [(s, f"generator {name}") for name, s in g.faults()] + [(s, f"discriminator {name}") for name, s in d.faults()]
        if faults := sorted(faults):
            names = [name for s, name in faults if s == faults[0][0]]
            raise UsageError(f"gradients that are not finite, first at step {faults[0][0]} in {len(names)} tensors ({', '.join(names[:3])}"
                             f"{', ...' if len(names) > 3 else ''}); the last checkpoint is kept, try a smaller --lr or --lr-d") from error
        raise
    return ema, history


# -------------------------------------------------------------------------------------------------------------------- measurement

@torch.no_grad()
def activation_changes(teacher, x0, noise, sigmas, labels=None):
    """{block: how much its output changes from each noise level to the next, relative to its size}: len(sigmas) - 1 numbers each.

    The same images and the same noise at all levels.
    """
    blocks = {name: block for name, block in teacher.net.named_modules() if isinstance(block, Block)}
    now, before, changes = {}, {}, {name: [] for name in blocks}
    hooks = [block.register_forward_hook(lambda block, inputs, y, name=name: now.update({name: y})) for name, block in blocks.items()]
    for sigma in sigmas:
        teacher(x0 + sigma * noise, sigma, labels)
        for name in blocks:
            if before:
                changes[name].append(((now[name] - before[name]).norm() / before[name].norm()).item())
        before = dict(now)
    for hook in hooks:
        hook.remove()
    return changes


def evaluate(config, run, teacher, judge, generator, history):
    """Rows: the teacher's DDIM at a few budgets, the one-step generator, the teacher at its best; and the pictures."""
    shape, label_dim, half = teacher.net.img_shape, teacher.net.label_dim, 2 if config.smoke else 18
    name = "gdd" if config.freeze == "none" else "gdd-i"

    def walk(solver, sigmas):
        return lambda noise, labels: solver(with_labels(teacher, labels), config.sigma_max * noise, sigmas)

    samplers = {("ddim", nfe): walk(euler, sigma_grid("edm", nfe, sigma_max=config.sigma_max)) for nfe in config.nfe}
    samplers[name, 1] = one_step(generator, config.sigma_max)
    fine = torch.cat([sigma_grid("edm", half - 1, sigma_max=config.sigma_max), torch.zeros(1, dtype=torch.float64)])
    samplers["teacher", 2 * half - 1] = walk(heun, fine)
    rows, pictures = measure(samplers, config, shape, run.device, judge, label_dim)
    if run.rank > 0:
        return rows
    del pictures[f"{name} 1"]  # the last of the history
    save_rows(run.out / "samples.png", {**history.pictures, **pictures})

    every = max(1, len(history.losses) // 100)  # steps that one point of the curve is the mean of
    means = torch.stack([part.mean(0) for part in history.losses.cpu().split(every)])
    xs = [config.batch_size * every * i for i in range(len(means))]
    curves = {"generator": (xs, means[:, 0].tolist()), "discriminator": (xs, means[:, 1].tolist())}
    save_curves(run.out / "losses.png", curves, "images", "loss, summed over heads", f"{config.dataset}, {rows[-2]['name']}")

    data = load_dataset(config.dataset, "train", config.data_dir)  # on the CPU: 64 images of it are wanted
    x0, labels = (part.to(run.device) for part in Stream(data, min(64, len(data.images)), config.seed).next())
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(config.seed)).to(run.device)
    sigmas = sigma_grid("logsnr", 24, sigma_max=config.sigma_max).tolist()
    changes = activation_changes(teacher, x0, noise, sigmas, labels if label_dim else None)
    save_heatmap(run.out / "layers.png", changes, sigmas[1:], "sigma", "teacher: change of every block's output to the next level")
    return rows


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("distributional", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    judge = make_judge(config, run.device, unseen=True)
    generator, history = train(config, run, teacher, judge)
    results = evaluate(config, run, teacher, judge, generator, history)
    if run.rank > 0:
        return
    run.metrics(results, teacher=config.teacher or f"{config.dataset} (shipped or cached)", trace=history.rows)
    run.say(table(results, ["name", "nfe", *SCORES]))
    run.say("fid on the way: " + ", ".join(f"{row['images']:,} images {row['fid']:.3g}" for row in history.rows))
    run.say(f"{run.seconds():.0f} s; results in {run.out}: metrics.json, samples.png, losses.png, layers.png")


if __name__ == "__main__":
    cli(main)
