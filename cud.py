"""CUD: Catch-Up Distillation (Shao et al. 2023, arXiv:2305.10769).

Idea: a rectified flow learns the velocity of straight paths from data to noise. CUD
trains one once, without a teacher, with a second target: its own velocity, without
gradient, one Euler step later on the ODE. Its samples need fewer solver steps.

x0: an image; z1: noise; z = (1 - t) x0 + t z1, t uniform in (1e-5, 1), sigma = t / (1 - t);
v: the network; h: a step, uniform in (0, 1 / TN); sg: without gradient. Losses, as mean
squares over batch and pixels, with their places in the official code:
 (a) catch-up   |v(z, t) - sg v(z - h v(z, t), t - h)|^2        train_cud_*.py:125, flows.py:318
 (b) flow       |v(z, t) - (z1 - x0)|^2                         the same line
 (c) coupling   20 KL(q(z1 | x0) || N(0, I)), z1 ~ q of an encoder         :148, utils.py:105
                --independent: no encoder, z1 ~ N(0, I)
 (d) one step   |z1 - v(z1, 1) - x0_m|^2 + 0.1 |v(z1, 1) - sg v_EMA(z1, 1)|^2
                trains a copy of the finished CUD. x0_m is the image that CUD predicts after
                m of 16 Euler steps from z1: a third of the training has m = 8, the next 11,
                the last 14                             train_distill_update.py:78, 103-108
RK12 has one head (output of the network), RK23 two, RK34 three. Head i learns the velocity
at time t - i h in z - i h K, with K the slope of one Runge-Kutta step of length h: one
slope stretched over i steps, first-order accurate for i > 1. (a), (b): sums over the heads.
Samples are made with the last head (the official --generator 2 or 3), or with --head.
Prior ShakeDrop (--shakedrop): where the decoder's features meet the encoder's skips, the
features are multiplied by 2 s, the skips by 2 (1 - s), with s = phi + t (1 - 2 phi).

Differences from the official code (Catch-Up-Distillation, commit 7d271f1):
 1. v inside sg v(z - h v(z, t), ...) is the prediction itself (theirs: evaluated again,
    with another dropout mask).
 2. One step: with ShakeDrop as in training (theirs: without), targets in float32
    (theirs: 8-bit PNGs); the result is the EMA (theirs: the raw weights).
 3. Decay of the EMA in step i: min(.9999, (1 + i) / (10 + i)) (theirs: .9999, in their
    ImageNet-64 repository .99994).
 4. The encoder has two heads, mean and log variance (theirs: one of twice the channels).
 5. Heun's method ends at t = 0 (theirs: at t = 1/2, its steps are half as long).
 6. Adaptive weights act on all heads (theirs: in RK12 only).
 7. imagenet64: classes, flips, no encoder, as in their ImageNet-64 repository (bb30d56), but
    without its wavelet loss (cm/karras_diffusion.py:133-139); stage (d) is not from there.
 8. digits, mnist, folder: all settings are chosen here, for a CPU: adaptive weights,
    TN = 160, no encoder, no ShakeDrop (theirs for mnist: fixed weights, 16, both).
Digits, FID* of 4 Euler steps: 3.09, rectified flow 5.84; the shipped teacher by UniPC, with
nothing learned, .32. With the best solver for each, a smaller CUD has .83, .91, .93 of
rectified flow's FID* at equal iterations, .94, 1.04, 1.04 at equal compute (2, 4, 8
evaluations, three seeds): what it gains is mostly Euler's error. More: RESULTS.md
    python cud.py --baseline               # digits: 9 minutes on 2 CPU cores, 5 without
    python cud.py --dataset mnist --rk 34  # three heads
"""
import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from common import unet
from common.baselines import solver_order_grid, untrained_samplers
from common.datasets import Stream, load_dataset
from common.diffusion import expand, flow_from_edm, noise_from_seeds, sigma_grid
from common.fid import make_evaluator, measure
from common.machinery.options import cli, complete, option, parse_config, require
from common.machinery.plots import save_fid_curves, save_rows
from common.machinery.run import Run
from common.solvers import SOLVERS, steps_for
from common.teacher import NetworkOptions, ema_update, new_network, save_velocity

EPS = 1e-5  # smallest t
FLOWS = ("rectified-flow", "rectified-flow-equal-compute")

# --- the method


def mean_square(a, b):
    return (a - b).square().mean()


def catch_up_targets(velocity, z, t, h, k1, flow_target, heads=1):
    """Targets of (a): head i is to predict the velocity at time t - i h in z - i h K.

    z, k1 = v(z, t), flow_target = z1 - x0 (B, C, H, W); t, h (B,) -> (heads, B, C, H, W).
    Where the last time would be below EPS the targets are flow_target.
    """
    def v(z_i, i):
        return velocity(z_i, (t - i * h).clamp(EPS, 1))[0]  # (B, C, H, W)

    s, k = expand(h, z), k1  # RK12: K is the slope of an Euler step
    if heads > 1:  # RK23: of a step of Heun's method
        k2 = v(z - s * k1, 1)
        k = (k1 + k2) / 2
    if heads > 2:  # RK34: of a Runge-Kutta step with a third evaluation, at t - 2 h
        k3 = v(z - (expand(7 * h, z) * k1 + s * k2) / 4, 2)
        k = 5 / 12 * k1 + 2 / 3 * k2 - 1 / 12 * k3
    targets = torch.stack([v(z - expand(i * h, z) * k, i) for i in range(1, heads + 1)])
    has_room = t >= EPS + heads * h  # (B,), boolean
    return torch.where(has_room.view(-1, *[1] * (z.ndim - 1)), targets, flow_target)


def catch_up_loss(velocity, x0, z1, t, h, heads=1, w=1):
    """w (a) + (2 - w) (b) of x0, z1 (B, C, H, W), t, h (B,): sums over the heads.

    velocity(z, t, heads) -> (heads, B, C, H, W). w is 1, or with --adaptive-weight it
    rises from 0 to 2 (train_cud_*.py:123).
    """
    z, flow_target = expand(1 - t, x0) * x0 + expand(t, x0) * z1, z1 - x0
    predictions = velocity(z, t, heads)
    with torch.no_grad():  # the weights as they are now, not an EMA
        targets = catch_up_targets(velocity, z, t, h, predictions[0], flow_target, heads)
    catch_up = sum(mean_square(v, sg_v) for v, sg_v in zip(predictions, targets))  # (a)
    flow = sum(mean_square(v, flow_target) for v in predictions)  # (b)
    return w * catch_up + (2 - w) * flow


def flow_loss(velocity, x0, z1, t):
    """(b) alone: rectified flow (Liu et al. 2022, arXiv:2209.03003, Eq. 1)."""
    z = expand(1 - t, x0) * x0 + expand(t, x0) * z1
    return mean_square(velocity(z, t)[0], z1 - x0)


def encode(encoder, x0, noise):
    """z1 (B, C, H, W) ~ q(z1 | x0) = N(mu, exp(logvar)), and the KL of (c)."""
    mu, logvar = encoder(x0, 1.0, 2)
    z1 = mu + noise * (logvar / 2).exp()
    return z1, (mu**2 + logvar.exp() - 1 - logvar).mean() / 2


def one_step_loss(velocity, ema, z1, x0):
    """(d): |z1 - v(z1, 1) - x0|^2 + 0.1 |v(z1, 1) - v_EMA(z1, 1)|^2."""
    v, v_ema = velocity(z1, 1.0)[0], ema(z1, 1.0)[0].detach()
    return mean_square(z1 - v, x0) + 0.1 * mean_square(v, v_ema)


@torch.no_grad()
def one_step_targets(velocity, z1, head=1):
    """x0_m of (d), the images predicted after m of 16 Euler steps: (3, B, C, H, W)."""
    zs = []  # the states at t = 1, 15/16, ..., 0
    sample(velocity, z1, 16, head=head, callback=lambda i, z: zs.append(z))
    # At state m, t = (16 - m) / 16 and the Euler step is -v / 16: x0 = z - t v is the state
    # plus 16 - m such steps.
    return torch.stack([zs[m] + (16 - m) * (zs[m + 1] - zs[m]) for m in (8, 11, 14)])


class Velocity(nn.Module):
    """v(z, t): a raw U-Net conditioned on t, and heads 2, 3 on its last features."""

    def __init__(self, net, heads=1, phi=None):
        super().__init__()
        self.net, self.phi, self.more = net, phi, nn.ModuleList()
        c, c_out = net.feature_channels, net.out_channels
        for _ in range(heads - 1):
            conv = unet.Conv2d(c, c_out, 3, net.family.init_zero)
            self.more.append(nn.Sequential(unet.group_norm(c, 1e-6), nn.SiLU(), conv))

    def forward(self, z, t, heads=1, labels=None):
        """z (B, C, H, W), t (B,) or a number, labels (B,) -> (heads, B, C, H, W), as z."""
        t = expand(t, z).float().flatten().expand(len(z))
        # Prior ShakeDrop: the decoder's share s
        share = None if self.phi is None else t * (1 - 2 * self.phi) + self.phi
        features = self.net.forward_features(z.float(), t, labels, balance=share)
        velocities = [self.net.head(features)]
        for head in self.more[: heads - 1]:
            velocities.append(self.net.pixels(head(features)))
        return torch.stack(velocities).to(z.dtype)


def sample(velocity, noise, nfe=1, solver="euler", grid="even", head=1, **options):
    """Unit noise (B, C, H, W) -> x0 by nfe evaluations of a head of the velocity.

    grid "even": equal steps of t from 1 to 0 (official). Else one of common.diffusion's
    GRIDS in sigma, where a flow is a denoiser like any other. options: order, callback.
    """
    def x0_hat(z, t):  # D = z - t v: the slope of common.solvers, (z - D) / t, is v
        return z - expand(t, z) * velocity(z, t.reshape(-1), head)[-1]

    if grid == "even":
        steps = steps_for(solver, nfe, ends_in_zero=True)
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return SOLVERS[solver](x0_hat, noise, t, **options)
    sigmas = sigma_grid(grid, steps_for(solver, nfe))
    denoiser = lambda x, sigma: x0_hat(*flow_from_edm(x, sigma))
    return SOLVERS[solver](denoiser, sigmas[0] * noise, sigmas, **options)


# --- options


@dataclass
class Config(NetworkOptions):
    rk: str = option("12", "Runge-Kutta with 1, 2, 3 heads", choices=("12", "23", "34"))
    head: int | None = option(None, "head that is sampled (default, official: the last)", low=1)
    tn: int | None = option(None, "largest step h: 1 / TN (official: 16)", low=3)
    adaptive_weight: bool | None = option(None, "catch-up loss weighs 0 to 2, flow loss 2 to 0")
    independent: bool | None = option(None, "no encoder: z1 is noise (official)")
    kl_weight: float = option(20.0, "weight of the encoder's KL (official: 20)", low=0)
    encoder_channels: int | None = option(None, "width of the encoder", above=0)
    shakedrop: bool | None = option(None, "weigh decoder against encoder by t (official)")
    phi: float | None = option(None, "ShakeDrop: the decoder's share at t = 0", low=0, high=1)
    baseline: bool = option(False, "also train rectified flow: as many steps; as much compute")
    distill_steps: int | None = option(None, "one-step stage: steps per target (0: none)", low=0)
    distill_n: int | None = option(None, "noise images of the one-step stage", above=0)
    distill_lr: float | None = option(None, "learning rate of the one-step stage", above=0)
    nfe: tuple[int, ...] = option((1, 2, 4, 8, 16), "network evaluations")
    sampler: tuple[str, ...] | None = option(None, "SOLVER/GRID of each row: unipc3/cosine ...")

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        self.fit_network()
        self.heads = int(self.rk[0])
        self.head = self.head or self.heads
        require(self.head <= self.heads, "head", self.head, f"RK{self.rk} has {self.heads}")
        for name in self.sampler:
            solver_order_grid(name, self.nfe)


# Official: README and configs/*.json of both repositories.
_CIFAR10 = dict(
    tn=16, adaptive_weight=False, independent=False, shakedrop=True, phi=0.75, arch="ddpmpp",
    model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,),
    dropout=0.13, encoder_channels=32, conditional=False, flip=True, steps=500_000,
    batch_size=128, lr=2e-4, warmup=5000, distill_steps=40_000, distill_n=50_000,
    distill_lr=2e-4, sampler=("euler/even",), eval_n=50_000, eval_batch=256,
)
_DIGITS = dict(
    tn=160, adaptive_weight=True, independent=True, shakedrop=False, phi=0.75, arch="ddpmpp",
    model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0,
    encoder_channels=16, conditional=False, flip=False, steps=1500, batch_size=64, lr=2e-3,
    warmup=100, distill_steps=120, distill_n=4096, distill_lr=5e-4,
    sampler=("euler/even", "unipc3/even"), eval_n=2048, eval_batch=256,
)
_MNIST = dict(
    _DIGITS, model_channels=16, channel_mult=(1, 2, 4), num_blocks=2, attn_resolutions=(7,),
    steps=1000, batch_size=32, distill_n=2048, eval_n=1024, eval_batch=32,
)
PRESETS = {
    "digits": _DIGITS,
    "mnist": _MNIST,
    "cifar10": dict(_MNIST, attn_resolutions=(8,), conditional=True, flip=True, steps=2000),
    "cifar10-gpu": _CIFAR10,
    "imagenet64": dict(
        _CIFAR10, arch="adm", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
        attn_resolutions=(32, 16, 8), dropout=0.1, independent=True, conditional=True,
        batch_size=1024, lr=4e-4, warmup=0, distill_n=10_000, distill_lr=4e-4, eval_batch=128,
    ),
    "folder": dict(_MNIST, channel_mult=None, attn_resolutions=None, num_blocks=1, flip=True,
                   distill_n=1024, eval_n=500),
    "folder-gpu": dict(_CIFAR10, eval_n=10_000),
}
SMOKE = dict(steps=4, batch_size=8, warmup=1, distill_steps=1, distill_n=16, eval_n=32)

# --- training


def make_net(config, data, encoder=False):
    if encoder:
        size = dict(model_channels=config.encoder_channels, num_blocks=min(2, config.num_blocks))
        return Velocity(new_network(config, data, label_dim=0, **size)[0], heads=2)
    phi = config.phi if config.shakedrop else None
    return Velocity(new_network(config, data)[0], config.heads, phi)


def same_start(run, stream, optimizer, start, *nets):
    """Begin a training: the draws of the others, a new optimizer, the weights of `start`."""
    torch.manual_seed(run.config.seed + 1)
    stream.position = 0
    optimizer.state.clear()
    optimizer.zero_grad()
    for net in nets:
        net.load_state_dict(start.state_dict())


def ema_decay(i):
    return min(0.9999, (1 + i) / (10 + i))


def train_flow(config, run, stream, trained, emas, optimizer, name, iterations):
    """CUD, or the baseline: the same loop with another loss."""
    (net, *encoder), ema = trained, emas[name]  # encoder: [] with --independent

    def loss_fn(w, x0, noise, t, h, labels):
        v = partial(net, labels=labels)
        if name != "cud":
            return flow_loss(v, x0, noise, t)
        z1, kl = encode(*encoder, x0, noise) if encoder else (noise, 0)
        return catch_up_loss(v, x0, z1, t, h, config.heads, w) + config.kl_weight * kl

    for i in run.steps(iterations, name):
        if i == 0:
            same_start(run, stream, optimizer, ema, net)
        n = config.batch_size
        t, h = run.rand(n) * (1 - EPS) + EPS, run.rand(n) / config.tn  # (B,)
        x0, labels = stream.next()  # (B, C, H, W), (B,)
        noise = run.randn(n, *x0.shape[1:])
        w = 2 * i / iterations if config.adaptive_weight else 1
        run.loss = run.backward(optimizer, partial(loss_fn, w), x0, noise, t, h, labels)
        optimizer.param_groups[0]["lr"] = config.lr * min(1, (i + 1) / max(1, config.warmup))
        optimizer.step()
        ema_update(ema, net, ema_decay(i))
        # After as many iterations as CUD this is the baseline of equal iterations; the
        # training goes on to the one of equal compute.
        if name == FLOWS[1] and i == config.steps - 1:
            emas[FLOWS[0]].load_state_dict(ema.state_dict())


def train_one_step(config, run, stream, trained, emas, optimizer):
    net, cud, ema = trained[0], emas["cud"], emas["cud-1step"]
    seeds = torch.arange(config.distill_n) + 10**9 * (config.seed + 1)  # no held-out ones
    z1 = noise_from_seeds(seeds, net.net.img_shape, run.device).float()  # (N, C, H, W)
    labels = (seeds % max(1, net.net.label_dim)).to(run.device)
    batches = zip(z1.split(config.eval_batch), labels.split(config.eval_batch))
    x0 = [one_step_targets(partial(cud, labels=y), z, config.head).float() for z, y in batches]
    x0 = torch.cat(x0, dim=1)  # (3, N, C, H, W)

    def loss_fn(z1, x0, labels):
        return one_step_loss(partial(net, labels=labels), partial(ema, labels=labels), z1, x0)

    for i in run.steps(3 * config.distill_steps, "one step"):
        if i == 0:
            same_start(run, stream, optimizer, cud, net, ema)
        indices = run.randint(config.distill_n, config.batch_size)
        m = i // config.distill_steps  # 0, 1, 2: first all steps with the first target
        batch = z1[indices], x0[m, indices], labels[indices]
        run.loss = run.backward(optimizer, loss_fn, *batch)
        optimizer.param_groups[0]["lr"] = config.distill_lr
        optimizer.step()
        ema_update(ema, net, ema_decay(i))


def train(config, run=None):
    """Returns the EMAs asked for, {row name: Velocity}."""
    run = run or Run("cud", config)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    stream = Stream(data, config.batch_size, config.seed, config.flip)
    trained = nn.ModuleList([make_net(config, data)])
    if not config.independent:
        trained.append(make_net(config, data, encoder=True))
    trained.to(run.device, memory_format=torch.channels_last)
    names = ["cud", *(FLOWS if config.baseline else ())]
    names += ["cud-1step"] if config.distill_steps else []
    emas = nn.ModuleDict({name: copy.deepcopy(trained[0]) for name in names}).eval()
    emas.requires_grad_(False)
    optimizer = torch.optim.Adam(trained.parameters(), fused=True)
    run.prepare(*trained)
    run.resume(trained=trained, emas=emas, optimizer=optimizer, stream=stream)
    state = stream, trained, emas, optimizer
    train_flow(config, run, *state, "cud", config.steps)
    if config.baseline:
        # Network passes of one iteration of CUD, a backward pass counting as two: 2 heads - 1
        # forward for the targets, 3 for the loss, 3 for the encoder. Rectified flow has 3.
        passes = 2 * config.heads - 1 + 3 * (2 - config.independent)
        train_flow(config, run, *state, FLOWS[1], round(config.steps * passes / 3))
    if config.distill_steps:
        train_one_step(config, run, *state)
    if run.rank == 0:  # a teacher for any script
        save_velocity(run.out / "velocity.safetensors", emas["cud"], config)
    return emas


def samplers(config, nets):
    """{(row name, NFE): sampler(noise, labels) -> x0}, as `measure` takes them."""
    def sampler(net, noise, labels, **how):
        return sample(partial(net, labels=labels), noise, **how)

    found = {}
    for name, net in nets.items():
        if name == "cud-1step":
            found[name, 1] = partial(sampler, net)
            continue
        head = config.head if name == "cud" else 1  # rectified flows train head 1 alone
        for text in config.sampler:
            solver, order, grid = solver_order_grid(text)
            how = dict(solver=solver, order=order, grid=grid, head=head)
            row = name if text == "euler/even" else f"{name} ({text.replace('/', ', ')})"
            for nfe in config.nfe:
                found[row, nfe] = partial(sampler, net, nfe=nfe, **how)
    return found


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("cud", config)
    evaluator = make_evaluator(config, run.device, unseen=True)
    nets = train(config, run)
    free = untrained_samplers(config.dataset, config.nfe, run.device, nets["cud"].net.label_dim)
    found = samplers(config, nets) | free
    rows, pictures = measure(run, found, nets["cud"].net, evaluator)
    save_rows(run.out / "samples.png", pictures)
    save_fid_curves(run.out / "fid.png", rows)
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
