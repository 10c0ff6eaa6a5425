"""CUD: Catch-Up Distillation (Shao et al. 2023, arXiv:2305.10769).

Idea: a rectified flow learns the velocity of straight paths from data to noise. CUD trains one
once, without a teacher, with a second target: the velocity of the same weights at t - h on their
own trajectory. The velocity becomes consistent along it: few Euler steps are enough.

Loss for RK12, mean over batch and pixels; z = (1 - t) x0 + t z1, z1 noise, sigma = t / (1 - t);
t uniform in (1e-5, 1), h in (0, 1 / TN); sg: no gradient:
    |v(z, t) - sg v(z - h sg v(z, t), t - h)|^2 + |v(z, t) - (z1 - x0)|^2
RK23, RK34: 2, 3 heads. The target of head i is the velocity after i Runge-Kutta steps.
Coupling: z1 ~ q(z1 | x0) of an encoder, + 20 KL(q || N(0, I)); --independent: z1 = noise.
One step: a copy of the EMA learns |z - v1 - x0_m|^2 + 0.1 |v1 - v1 of its EMA|^2, v1 = v(z, 1);
x0_m: the data that CUD predicts after m = 8, then 11, then 14 of 16 Euler steps from z.

Differences from the official code (Catch-Up-Distillation, commit 7d271f1):
 1. Targets without dropout (theirs: with).
 2. One step: ShakeDrop as in training (theirs: off), float targets (theirs: 8-bit).
 3. EMA decay min(0.9999, (1 + i) / (10 + i)) (theirs: 0.9999). The encoder has two heads, mean
    and log variance (theirs: one of twice the channels).
 4. Heun's steps cover the whole interval (theirs: half of it).
 5. digits: adaptive weights, TN = 160 (theirs: neither; 16).
Digits, FID of 4 evaluations: 3.09; rectified flow: 5.84. More: RESULTS.md
    python cud.py --baseline               # digits: 9 minutes on 2 CPU cores, 5 without
    python cud.py --dataset mnist --rk 34  # three heads
"""
import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from common import unet
from common.datasets import Stream, load_dataset
from common.diffusion import expand, noise_from_seeds
from common.fid import make_evaluator, measure
from common.machinery.flow_teachers import FlowDenoiser
from common.machinery.options import cli, complete, option, parse_config
from common.machinery.plots import save_fid_curves, save_rows
from common.machinery.run import Run
from common.solvers import SOLVERS, steps_for
from common.teacher import NetworkOptions, ema_update, new_network, save_teacher

EPS = 1e-5  # smallest t
FLOWS = ("rectified-flow", "rectified-flow-equal-compute")

# --- the method


def catch_up_targets(velocity, z, t, h, k1, flow_target, heads=1):
    """Target of head i: the velocity at t - i h, after i Runge-Kutta steps from z.

    z, k1 = v(z, t), flow_target (B, C, H, W); t, h (B,) -> (heads, B, C, H, W). Where t is too
    small: flow_target. At 2 h, 3 h first-order accurate (official).
    """
    def v(z_i, i):
        return velocity(z_i, (t - i * h).clamp(EPS, 1))[0]  # (B, C, H, W)

    s, k = expand(h, z), k1  # RK12: Euler
    if heads > 1:  # RK23: Heun
        k2 = v(z - s * k1, 1)
        k = (k1 + k2) / 2
    if heads > 2:  # RK34
        k3 = v(z - (expand(7 * h, z) * k1 + s * k2) / 4, 2)
        k = 5 / 12 * k1 + 2 / 3 * k2 - 1 / 12 * k3
    targets = torch.stack([v(z - expand(i * h, z) * k, i) for i in range(1, heads + 1)])
    return torch.where(expand(t >= EPS + heads * h, z) > 0, targets, flow_target)


def catch_up_loss(velocity, x0, z1, t, h, heads=1, w=1, eval_mode_velocity=None):
    """The paper's loss of x0, z1 (B, C, H, W), t, h (B,): the sum over heads of mean squares.

    velocity(z, t, heads) -> (heads, B, C, H, W). w, 2 - w: the weights of both terms.
    eval_mode_velocity: for targets without dropout.
    """
    z, flow_target = expand(1 - t, x0) * x0 + expand(t, x0) * z1, z1 - x0
    predictions = velocity(z, t, heads)
    with torch.no_grad():  # the weights as they are now, not an EMA
        k1 = predictions[0]
        if eval_mode_velocity:
            velocity = eval_mode_velocity
            k1 = velocity(z, t)[0]
        targets = catch_up_targets(velocity, z, t, h, k1, flow_target, heads)
    catch_up = (predictions - targets).square().mean() * heads
    flow = (predictions - flow_target).square().mean() * heads
    return w * catch_up + (2 - w) * flow


def flow_loss(velocity, x0, z1, t):
    """Rectified flow, the baseline: |v(z, t) - (z1 - x0)|^2."""
    z = expand(1 - t, x0) * x0 + expand(t, x0) * z1
    return (velocity(z, t)[0] - (z1 - x0)).square().mean()


def one_step_loss(velocity, ema, z, x0):
    """|z - v(z, 1) - x0|^2 + 0.1 |v(z, 1) - v_EMA(z, 1)|^2."""
    v, v_ema = velocity(z, 1.0)[0], ema(z, 1.0)[0].detach()
    return (z - v - x0).square().mean() + 0.1 * (v - v_ema).square().mean()


@torch.no_grad()
def one_step_targets(velocity, z):
    """z (B, C, H, W) -> the data predicted after 8, 11, 14 of 16 Euler steps, (3, B, C, H, W)."""
    zs = []
    sample(velocity, z, 16, callback=lambda i, z: zs.append(z))
    return torch.stack([zs[m] + (16 - m) * (zs[m + 1] - zs[m]) for m in (8, 11, 14)])  # z - t v


def encode(encoder, x0, noise):
    """z1 (B, C, H, W) ~ q(z1 | x0) = N(mu, exp(logvar)), and KL(q || N(0, I))."""
    mu, logvar = encoder(x0, 1.0, 2)
    z1 = mu + noise * (logvar / 2).exp()
    return z1, (mu**2 + logvar.exp() - 1 - logvar).mean() / 2


class Velocity(nn.Module):
    """v(z, t): a raw U-Net conditioned on t, with further heads on its features."""

    def __init__(self, net, heads=1, phi=None):
        super().__init__()
        self.net, self.phi, self.more = net, phi, nn.ModuleList()
        c = [m.num_channels for m in net.modules() if isinstance(m, nn.GroupNorm)][-1]
        for _ in range(heads - 1):
            conv = unet.Conv2d(c, net.img_channels, 3, net.family.init_zero)
            self.more.append(nn.Sequential(unet.group_norm(c, 1e-6), nn.SiLU(), conv))

    def forward(self, z, t, heads=1, labels=None):
        """z (B, C, H, W), t (B,) or a number, labels (B,) -> (heads, B, C, H, W) in z's dtype."""
        t = expand(t, z).float().flatten().expand(len(z))
        balance = None
        if self.phi is not None:  # ShakeDrop: the decoder's share, 1 - phi at t = 1
            balance = t * (1 - 2 * self.phi) + self.phi
        features = self.net.forward_features(z.float(), t, labels, balance=balance)
        used = (self.net.head, *self.more[: heads - 1])
        return torch.stack([head(features) for head in used]).to(z.dtype)

    def in_eval_mode(self, z, t, labels=None):
        self.eval()  # no dropout
        v = self(z, t, labels=labels)
        self.train()
        return v


def sample(velocity, noise, nfe=1, solver="euler", **options):
    """Unit noise (B, C, H, W) -> x0 in equal steps of t, with nfe evaluations."""
    def denoiser(z, t):  # D = z - t v: the slope of common.solvers, (z - D) / t, is v
        return z - expand(t, z) * velocity(z, t.reshape(-1))[0]

    steps = steps_for(solver, nfe, ends_in_zero=True)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return SOLVERS[solver](denoiser, noise, t, **options)


# --- options


@dataclass
class Config(NetworkOptions):
    rk: str = option("12", "12, 23, 34: 1, 2, 3 heads (paper: all)", choices=("12", "23", "34"))
    tn: int | None = option(None, "largest step: 1 / TN (official: 16)", low=3)
    adaptive_weight: bool | None = option(None, "weights: catch-up 0 to 2, flow 2 to 0 (official)")
    independent: bool | None = option(None, "no encoder: z1 is noise (official)")
    kl_weight: float = option(20.0, "weight of the encoder's KL (official: 20)", low=0)
    encoder_channels: int | None = option(None, "width of the encoder", above=0)
    shakedrop: bool | None = option(None, "weigh decoder against skips by t (official)")
    phi: float | None = option(None, "ShakeDrop: the decoder's share at t = 0", low=0, high=1)
    baseline: bool = option(False, "also rectified flow: equal iterations; equal compute")
    distill_steps: int | None = option(None, "one-step iterations per target; 0: none", low=0)
    distill_n: int | None = option(None, "its noise images", above=0)
    distill_lr: float | None = option(None, "its rate", above=0)
    nfe: tuple[int, ...] = option((1, 2, 4, 8, 16), "network evaluations")
    solver: str = option("euler", "sampler (official)", choices=tuple(SOLVERS))

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        self.fit_network()
        self.heads = int(self.rk[0])
        for nfe in (*self.nfe, *[1] * (self.distill_steps > 0)):
            steps_for(self.solver, nfe, ends_in_zero=True)


# Official: README, configs/*.json. Chosen here: digits, flips.
_CIFAR10 = dict(
    tn=16, adaptive_weight=False, independent=False, shakedrop=True, phi=0.75, arch="ddpmpp",
    model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,),
    dropout=0.13, encoder_channels=32, flip=True, steps=500_000, batch_size=128, lr=2e-4,
    warmup=5000, distill_steps=40_000, distill_n=50_000, distill_lr=2e-4,
    eval_n=50_000, eval_batch=256,
)
_DIGITS = dict(
    tn=160, adaptive_weight=True, independent=True, shakedrop=False, phi=0.75, arch="ddpmpp",
    model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0,
    encoder_channels=16, flip=False, steps=1500, batch_size=64, lr=2e-3, warmup=100,
    distill_steps=120, distill_n=4096, distill_lr=5e-4, eval_n=2048, eval_batch=256,
)
PRESETS = {
    "digits": _DIGITS,
    "mnist": dict(
        _DIGITS, model_channels=16, channel_mult=(1, 2, 4), num_blocks=2, attn_resolutions=(7,),
        steps=1000, batch_size=32, distill_n=2048, eval_n=1024, eval_batch=32,
    ),
    "cifar10": _CIFAR10,
    "imagenet64": dict(
        _CIFAR10, arch="adm", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
        attn_resolutions=(32, 16, 8), dropout=0.1, encoder_channels=64, flip=False,
        batch_size=1024, lr=4e-4, distill_n=10_000, distill_lr=4e-4, eval_batch=128,
    ),
    "folder": dict(
        _DIGITS, model_channels=16, channel_mult=None, attn_resolutions=None,
        flip=True, steps=1000, batch_size=32, distill_n=1024, eval_n=500,
    ),
    "folder-gpu": dict(_CIFAR10, eval_n=10_000),
}
SMOKE = dict(steps=4, batch_size=8, warmup=1, distill_steps=1, distill_n=16, eval_n=32)

# --- training


def make_net(config, data, encoder=False):
    if not encoder:
        phi = config.phi if config.shakedrop else None
        return Velocity(new_network(config, data)[0], config.heads, phi)
    size = dict(model_channels=config.encoder_channels, num_blocks=min(2, config.num_blocks))
    return Velocity(new_network(config, data, label_dim=0, **size)[0], heads=2)


def begin(run, stream, optimizer, start, *nets):
    """Each training sees the same draws; nets get the weights of `start`."""
    torch.manual_seed(run.config.seed + 1)
    stream.position = 0
    optimizer.state.clear()
    optimizer.zero_grad()
    for net in nets:
        net.load_state_dict(start.state_dict())


def draw(run, stream):
    """x0, noise (B, C, H, W); t, h, labels (B,)."""
    n = run.config.batch_size
    t, u = run.rand(n), run.rand(n)
    x0, labels = stream.next()
    noise = run.randn(n, *x0.shape[1:])
    return x0, noise, t * (1 - EPS) + EPS, u / run.config.tn, labels


def update(i, net, ema, optimizer, lr, warmup=1):
    optimizer.param_groups[0]["lr"] = lr * min(1, (i + 1) / max(1, warmup))
    optimizer.step()
    ema_update(ema, net, min(0.9999, (1 + i) / (10 + i)))


def train_cud(config, run, stream, trained, emas, optimizer):
    (net, *encoder), ema = trained, emas["cud"]

    def loss_fn(w, x0, noise, t, h, labels):
        z1, kl = encode(*encoder, x0, noise) if encoder else (noise, 0)
        v = partial(net, labels=labels)
        v_eval = partial(net.in_eval_mode, labels=labels) if config.dropout else None
        loss = catch_up_loss(v, x0, z1, t, h, config.heads, w, v_eval)
        return loss + config.kl_weight * kl

    for i in run.steps(config.steps, "cud"):
        if i == 0:
            begin(run, stream, optimizer, ema, net)
        w = 2 * i / config.steps if config.adaptive_weight else 1
        batch = draw(run, stream)
        run.loss = run.backward(optimizer, partial(loss_fn, w), *batch)
        update(i, net, ema, optimizer, config.lr, config.warmup)


def train_flow(config, run, stream, trained, emas, optimizer):
    net, halfway, ema = trained[0], *[emas[name] for name in FLOWS]

    def loss_fn(x0, noise, t, h, labels):
        return flow_loss(partial(net, labels=labels), x0, noise, t)

    targets = 2 * config.heads - (config.dropout == 0)  # evaluations
    passes = targets + 3 * (2 - config.independent)  # backward counts as 2, the encoder as net
    equal_compute = round(config.steps * passes / 3)
    for i in run.steps(equal_compute, "rectified flow"):
        if i == 0:
            begin(run, stream, optimizer, ema, net)
        run.loss = run.backward(optimizer, loss_fn, *draw(run, stream))
        update(i, net, ema, optimizer, config.lr, config.warmup)
        if i == config.steps - 1:  # as many iterations as CUD
            halfway.load_state_dict(ema.state_dict())


def train_one_step(config, run, stream, trained, emas, optimizer):
    net, cud, ema = trained[0], emas["cud"], emas["cud-1step"]
    seeds = torch.arange(config.distill_n) + 10**9 * (config.seed + 1)  # evaluation: 0, 1, ...
    z = noise_from_seeds(seeds, net.net.img_shape, run.device).float()  # (N, C, H, W)
    labels = (seeds % max(1, net.net.label_dim)).to(run.device)
    x0 = z.new_empty(3, *z.shape)
    for rows in torch.arange(len(z)).split(config.eval_batch):
        x0[:, rows] = one_step_targets(partial(cud, labels=labels[rows]), z[rows]).float()

    def loss_fn(z, x0, labels):
        return one_step_loss(partial(net, labels=labels), partial(ema, labels=labels), z, x0)

    for i in run.steps(3 * config.distill_steps, "one step"):
        if i == 0:
            begin(run, stream, optimizer, cud, net, ema)
        rows = run.randint(config.distill_n, config.batch_size)
        batch = z[rows], x0[i // config.distill_steps, rows], labels[rows]
        run.loss = run.backward(optimizer, loss_fn, *batch)
        update(i, net, ema, optimizer, config.distill_lr)


def save_velocity(path, velocity, config):
    denoiser = FlowDenoiser(velocity.net, velocity.phi)
    save_teacher(path, denoiser, config.arch, velocity.net.kwargs, config.dataset)


def train(config, run=None):
    """Returns the EMAs asked for, {row name: Velocity}."""
    run = run or Run("cud", config)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    stream = Stream(data, config.batch_size, config.seed, config.flip)
    trained = nn.ModuleList([make_net(config, data)])
    if not config.independent:
        trained.append(make_net(config, data, encoder=True))
    trained.to(run.device, memory_format=torch.channels_last)
    names = ["cud", *FLOWS * config.baseline, *["cud-1step"] * (config.distill_steps > 0)]
    emas = nn.ModuleDict({name: copy.deepcopy(trained[0]) for name in names}).eval()
    emas.requires_grad_(False)
    optimizer = torch.optim.Adam(trained.parameters(), fused=True)
    run.prepare(*trained)
    run.resume(trained=trained, emas=emas, optimizer=optimizer, stream=stream)
    state = stream, trained, emas, optimizer
    train_cud(config, run, *state)
    if config.baseline:
        train_flow(config, run, *state)
    if config.distill_steps:
        train_one_step(config, run, *state)
    if run.rank == 0:  # a teacher for any script
        save_velocity(run.out / "velocity.safetensors", emas["cud"], config)
    return emas


def samplers(config, nets):
    """{(row name, NFE): sampler(noise, labels) -> x0}."""
    def sampler(net, nfe, noise, labels):
        return sample(partial(net, labels=labels), noise, nfe, config.solver)

    nfes = {name: (1,) if name == "cud-1step" else config.nfe for name in nets}
    return {(k, nfe): partial(sampler, nets[k], nfe) for k in nets for nfe in nfes[k]}


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("cud", config)
    evaluator = make_evaluator(config, run.device, unseen=True)
    nets = train(config, run)
    rows, pictures = measure(run, samplers(config, nets), nets["cud"].net, evaluator)
    save_rows(run.out / "samples.png", pictures)
    save_fid_curves(run.out / "fid.png", rows)
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
