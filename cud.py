"""CUD: Catch-Up Distillation: You Only Need to Train Once for Accelerating Sampling (Shao et al. 2023, arXiv:2305.10769).

Idea: a rectified flow learns the velocity of the straight paths from data to noise. CUD adds a second target while it is trained,
once and without a teacher: the velocity of the *same* weights one small step further along the net's own walk. What the net says
now catches up with what it will say a moment later, so that few Euler steps suffice.

The paper's letters, kept in this file: z = (1 - t) x0 + t z1 with z1 the noise, v = z1 - x0. In the variables of common/:
sigma = t / (1 - t), x = z / (1 - t). There t = 1 is infinite: to begin there, a sampler walks in t.

Loss for RK12, mean over batch and pixels (sg: no gradient; t uniform in (1e-5, 1), step h uniform in (0, 1/16)):
    |v(z, t) - sg v(z - h sg v(z, t), t - h)|^2 + |v(z, t) - (z1 - x0)|^2
RK23 and RK34 have 2 and 3 heads: head k is to say what the velocity will be k steps later; the steps are Runge-Kutta's, of 2 and 3
evaluations; 4 and 6 terms. If t < 1e-5 + (number of heads) h, all catch-up targets are z1 - x0.
Coupling: z1 = mu(x0) + exp(logvar(x0) / 2) noise from an encoder trained along, + 20 KL(q(z1 | x0) || N(0, I)); --independent: z1 = noise.
One step: a copy of the EMA, v1 = v(z, 1), trained on |z - v1 - x0_m|^2 + 0.1 |v1 - v1 of its EMA|^2, where x0_m is the data
that the net predicts after m = 8, then 11, then 14 of 16 Euler steps from z.

Differences from the paper's official code (Catch-Up-Distillation, commit 7d271f1):
 1. Targets without dropout (theirs: with, by the mode the net is in; --target-dropout). Without dropout k1 = v(z, t) is the prediction
    itself and costs nothing (theirs: a second evaluation).
 2. --exact-rk: their 2 h and 3 h targets use the weights of the step h, of order 1 for these, and k3 of RK34 makes its step h one of
    order 2, not 3. The flag: the midpoint rule for 2 h (RK23); order 3 everywhere for one evaluation more (RK34).
 3. One step: ShakeDrop as in training (theirs: off); float targets (theirs: 8-bit). MNIST samples with its phi, 0.25 (theirs: 0.75).
 4. EMA decay min(0.9999, (1 + i) / (10 + i)) at iteration i (theirs: 0.9999 from the start). The encoder has a head for the mean and
    one for the log variance (theirs: one of twice the channels).
 5. Heun's steps cover the whole interval (theirs: half of it). In t, ipndm of order 2 is their dpm_solver_2, and of order 3 what their
    dpm_solver_3 would be without a wrong sign, a wrong time and a halved term. The digits preset has adaptive weights and TN = 160.
Measured: digits, FID [digits-classifier, n=2048] of Euler walks, mean of 3 seeds; on one busy CPU core 4.6 minutes, 8.4 with --baseline
    evaluations                                      1     2     4     8     16    straightness (0: straight)
    rectified flow, 1,500 iterations                 99.3  19.8  5.44  2.40  1.63  .141
    the same, 2,000: as much compute as CUD          100   18.0  4.63  1.89  1.23  .142
    cud, 1,500                                       94.7  12.6  2.75  1.44  1.23  .138
    cud-1step                                        2.52 (two seeds)
    The preset was chosen among seven settings, by seed 0's row; the official --no-adaptive-weight --tn 16 has 96.3, 15.6, 3.91, 1.88, 1.43
    there. At 16 evaluations and equal compute nothing is gained: what is left seems to be the error of a short training. The paths are
    hardly straighter. MNIST, CIFAR-10, ImageNet-64: not run.
    python cud.py                                    # digits, 2 CPU cores
    python cud.py --baseline                         # and a rectified flow, at equal iterations and at equal compute
    python cud.py --rk 34 --exact-rk --no-independent --shakedrop
    python cud.py --dataset mnist --baseline         # one GPU
"""
import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from common import unet
from common.datasets import Stream, load_dataset
from common.diffusion import GRIDS, expand, flow_from_edm, sigma_grid
from common.fid import labels_for, make_judge, measure
from common.plots import save_curves, save_rows
from common.solvers import ORDERS, SOLVERS, steps_for
from common.teacher import NetworkOptions, new_network
from common.training import (SCORES, Run, accumulate, autocast, average_gradients, cli, ema_update, fill_from_presets,
                             gather_rows, noise_from_seeds, option, parse_config, prepare, require, share_of, table)

EPS, DISTILL_FROM = 1e-5, (8, 11, 14)  # the smallest t; where in 16 Euler steps the one-step targets come from (official)
RK, STEP_RULES, WALKS = ("12", "23", "34"), ("uniform", "rule", "origin"), ("t", *GRIDS)


@dataclass
class Config(NetworkOptions):
    rk: str = option("12", "catch-up targets: 12, 23 or 34, of 1, 2 or 3 heads (paper: all three)", choices=RK)
    exact_rk: bool = option(False, "Runge-Kutta weights of the order that their names promise, for all targets")
    step_rule: str = option("uniform", "step h: u / TN with u uniform, t / TN (rule), 1 / TN (origin) (official)", choices=STEP_RULES)
    tn: int | None = option(None, "TN: largest step is 1 / TN (official: 16, which no flag of theirs changes)")
    adaptive_weight: bool | None = option(None, "at iteration i of I weigh catch-up by 2 i/I, the data by 2 (1 - i/I) (official flag)")
    target_dropout: bool = option(False, "compute the targets with dropout on, as the official code does")
    independent: bool | None = option(None, "z1 is independent of x0: no encoder (official flag)")
    kl_weight: float = option(20.0, "weight of the encoder's KL term (official commands: 20)")
    shakedrop: bool | None = option(None, "weigh decoder against skips by t (official flag)")
    phi: float | None = option(None, "ShakeDrop: share of the decoder at t = 0, that of the skips at t = 1")
    encoder_channels: int | None = option(None, "width of the encoder, of --num-blocks 2 at most")
    ema: float = option(0.9999, "decay of the EMA, for evaluation only; (1 + i) / (10 + i) while that is less (official: 0.9999)")
    baseline: bool = option(False, "also train a rectified flow: same start, data, noise and t; as many iterations, then as much compute")
    distill_steps: int | None = option(None, "iterations of the one-step student for each of its three targets (README: 40k); 0: none")
    distill_n: int | None = option(None, "noise images whose Euler runs are its data")
    distill_lr: float | None = option(None, "its learning rate")
    nfe: tuple[int, ...] = option((1, 2, 4, 8, 16), "network evaluations, one or several budgets")
    solver: str = option("euler", "sampler: one of common.solvers (official: euler)", choices=tuple(SOLVERS))
    order: int | None = option(None, "highest order of a multistep solver; ipndm in t: Adams-Bashforth (default: the solver's)")
    walk: str = option("t", "it walks in t, in equal steps from 1 to 0, or in sigma, from 80 to 0.002 on this grid", choices=WALKS)
    head: int = option(1, "the head that samples (official: 1)")

    def __post_init__(self):
        fill_from_presets(self, PRESETS, SMOKE)
        self.heads = int(self.rk[0])
        self.nfe = (self.nfe,) if isinstance(self.nfe, int) else tuple(dict.fromkeys(self.nfe))
        for name, right in ("rk", RK), ("step_rule", STEP_RULES), ("solver", SOLVERS), ("walk", WALKS):
            require(getattr(self, name) in right, name, getattr(self, name), f"choose one of {', '.join(right)}")
        for name in ("steps", "batch_size", "lr", "distill_n", "distill_lr", "model_channels", "num_blocks", "encoder_channels"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        for name in ("warmup", "distill_steps", "kl_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be below 0")
        for name in ("phi", "ema", "dropout"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be in 0 ... 1")
        require(self.tn >= self.heads, "tn", self.tn, f"must be at least {self.heads}, the number of heads of --rk {self.rk}")
        require(1 <= self.head <= self.heads, "head", self.head, f"--rk {self.rk} has {self.heads}")
        require(self.order in (None, *ORDERS[self.solver]), "order", self.order, f"{self.solver} offers {ORDERS[self.solver]}")
        for nfe in (*self.nfe, *(1,) * (self.distill_steps > 0)):  # the one-step student has a row of its own
            steps_for(self.solver, nfe, ends_in_zero=self.walk == "t")  # raises on a budget that the solver cannot meet


# Official: README commands and configs/*.json. The encoder's depth is 2 blocks everywhere but on digits; flips were chosen here.
_CIFAR10 = dict(tn=16, adaptive_weight=False, independent=False, shakedrop=True, phi=0.75, arch="ddpmpp", model_channels=128,
                channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,), dropout=0.13, encoder_channels=32, flip=True, steps=500_000,
                batch_size=128, lr=2e-4, warmup=5000, distill_steps=40_000, distill_n=50_000, distill_lr=2e-4, eval_n=50_000,
                eval_batch=256)
PRESETS = {
    "digits": dict(tn=160, adaptive_weight=True, independent=True, shakedrop=False, phi=0.75, arch="ddpmpp", model_channels=32,
                   channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0, encoder_channels=16, flip=False, steps=1500,
                   batch_size=64, lr=2e-3, warmup=100, distill_steps=120, distill_n=4096, distill_lr=5e-4, eval_n=2048,
                   eval_batch=256),
    "mnist": {**_CIFAR10, "model_channels": 32, "num_blocks": 2, "phi": 0.25, "flip": False, "steps": 50_000, "batch_size": 256, "lr": 3e-4,
              "distill_lr": 3e-4, "eval_n": 10_000},
    "cifar10": _CIFAR10,
    "imagenet64": {**_CIFAR10, "arch": "adm", "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3,
                   "attn_resolutions": (32, 16, 8), "dropout": 0.1, "encoder_channels": 64, "flip": False, "batch_size": 1024, "lr": 4e-4,
                   "distill_n": 10_000, "distill_lr": 4e-4, "eval_batch": 128},
    "folder": {**_CIFAR10, "eval_n": 10_000},
}
SMOKE = dict(steps=4, batch_size=8, warmup=1, distill_steps=1, distill_n=16, eval_n=32, eval_batch=32)


# ------------------------------------------------------------------------------------------------------------------- the network

class Velocity(nn.Module):
    """v(z, t): a raw U-Net that is told t itself, without preconditioning, and further heads on its last features."""

    def __init__(self, net, heads=1, phi=None):
        super().__init__()
        self.net, self.phi = net, phi
        norm = net.out_norm if net.family.out_head else list(net.dec.values())[-2]  # what the U-Net's own head begins with
        self.more = nn.ModuleList(nn.Sequential(unet.group_norm(norm.num_channels, 1e-6), nn.SiLU(), unet.Conv2d(
            norm.num_channels, net.img_channels, 3, net.family.init_zero)) for _ in range(heads - 1))

    def forward(self, z, t, heads=1, labels=None):
        """z (B, C, H, W), t (B,) or a number, labels (B,) -> what the first `heads` heads say, (heads, B, C, H, W), in z's dtype."""
        dtype = self.net.map_layer0.weight.dtype
        t = torch.as_tensor(t, dtype=dtype, device=z.device).expand(len(z))
        balance = None if self.phi is None else t * (1 - 2 * self.phi) + self.phi  # "prior ShakeDrop": phi at t = 0, 1 - phi at t = 1
        features = self.net.forward_features(z.to(dtype), t, labels, balance=balance)
        return torch.stack([head(features) for head in (self.net.head, *self.more[: heads - 1])]).to(z.dtype)


def labelled(net, labels):
    """A Velocity that knows its labels (B,), or None."""
    return net if labels is None else partial(net, labels=labels)


def gaussian_kl(mu, logvar):
    return (mu**2 + logvar.exp() - 1 - logvar).mean() / 2


def encode(encoder, x0, noise):
    """The learned coupling: z1 ~ q(z1 | x0) = N(mu, exp(logvar)) (B, C, H, W), and KL(q || N(0, I)), the mean over batch and pixels."""
    mu, logvar = encoder(x0, 1.0, 2)
    return mu + noise * (logvar / 2).exp(), gaussian_kl(mu, logvar)


# -------------------------------------------------------------------------------------------------------------------- the method

def step_size(rule, t, u, tn):
    """h (B,) for times t and uniform draws u."""
    return {"uniform": u / tn, "rule": t / tn, "origin": torch.full_like(u, 1 / tn)}[rule]


def catch_up_targets(velocity, z, t, h, k1, truth, heads=1, exact=False):
    """What head i is to say: v at t - i h, where i Runge-Kutta steps from z end; truth, for all heads, if t is too small for that.

    z, k1 = v(z, t), truth (B, C, H, W); t, h (B,) -> (heads, B, C, H, W).
    """
    def v(point, i):
        return velocity(point, (t - i * h).clamp(EPS, 1))[0]

    s, k = expand(h, z), k1
    if heads > 1:
        k2 = v(z - s * k1, 1)
        k = (k1 + k2) / 2
    if heads > 2:  # exact: with 4 k1 - 2 k2 the errors of k2 and k3 cancel in the step h
        k3 = v(z - (s * (4 * k1 - 2 * k2) if exact else (expand(7 * h, z) * k1 + s * k2) / 4), 2)
        k = 5 / 12 * k1 + 2 / 3 * k2 - 1 / 12 * k3
    ends = [z - expand(i * h, z) * k for i in range(1, heads + 1)]
    goals = [v(ends[0], 1)]
    if exact and heads == 2:  # the midpoint rule
        ends[1] = z - 2 * s * k2
    if exact and heads == 3:  # the first goal is a better k2, from which comes a better k3
        k3 = v(z - 2 * s * goals[0], 2)
        ends[1:] = z - s * (k1 + 4 * goals[0] + k3) / 3, z - s * (3 * k1 + 9 * k3) / 4  # Simpson's rule; Heun's of order 3
    goals += [v(end, i) for i, end in enumerate(ends[1:], 2)]
    return torch.where(expand(t >= EPS + heads * h, z) > 0, torch.stack(goals), truth)


def catch_up_loss(velocity, x0, z1, t, h, heads=1, weights=(1, 1), exact=False, quiet=None):
    """The loss of the paper for x0, z1 (B, C, H, W), t, h (B,): the sum over heads of mean squares.

    velocity(z, t, heads) -> (heads, B, C, H, W). quiet: the same function, for the targets, if dropout makes it random.
    """
    z, truth = expand(1 - t, x0) * x0 + expand(t, x0) * z1, z1 - x0
    predictions = velocity(z, t, heads)
    with torch.no_grad():
        k1 = predictions[0] if quiet is None else quiet(z, t)[0]
        targets = catch_up_targets(quiet or velocity, z, t, h, k1, truth, heads, exact)  # of the weights as they are now, not of an EMA
    catch_up, data = ((predictions - goal).square().mean() * heads for goal in (targets, truth))
    return weights[0] * catch_up + weights[1] * data


def flow_loss(velocity, x0, z1, t):
    """Rectified flow, the baseline: |v(z, t) - (z1 - x0)|^2."""
    return (velocity(expand(1 - t, x0) * x0 + expand(t, x0) * z1, t)[0] - (z1 - x0)).square().mean()


def one_step_loss(velocity, ema, z, x0_target):
    """|z - v(z, 1) - x0_target|^2 + 0.1 |v(z, 1) - v_EMA(z, 1)|^2, means over batch and pixels."""
    v = velocity(z, 1.0)[0]
    return (z - v - x0_target).square().mean() + 0.1 * (v - ema(z, 1.0)[0].detach()).square().mean()


# ---------------------------------------------------------------------------------------------------------------------- samplers

def as_denoiser(velocity, in_t=False):
    """What the net says of the data, x0 = z - t v, as a function D(x, sigma) in the variables of common/, or of (z, t).

    The second serves common.solvers as well: they walk dx/dsigma = (x - D) / sigma, and dz/dt = v is (z - D) / t.
    """
    def denoiser(x, level):
        z, t = (x, expand(level, x)) if in_t else flow_from_edm(x, level)
        return z - t * velocity(z, t.flatten())
    return denoiser


def times(n):
    """n equal steps from t = 1 to 0."""
    return torch.linspace(1, 0, n + 1, dtype=torch.float64)


def sample(velocity, noise, nfe=1, solver="euler", order=None, walk="t"):
    """Unit noise (B, C, H, W) -> x0 with exactly `nfe` evaluations; walk: "t", or the grid of a walk in sigma."""
    n = steps_for(solver, nfe, ends_in_zero=walk == "t")
    levels = times(n) if walk == "t" else sigma_grid(walk, n)
    return SOLVERS[solver](as_denoiser(velocity, walk == "t"), levels[0].item() * noise, levels, **({"order": order} if order else {}))


def of_head(net, head=1):
    """The velocity (z, t) -> (B, C, H, W) of one head."""
    return lambda z, t: net(z, t, head)[-1]


@torch.no_grad()
def along_euler(velocity, z, n):
    """n Euler steps from noise z: the n + 1 states, and n velocities and predictions of the data, (n or n + 1, B, C, H, W) each."""
    states = []
    SOLVERS["euler"](as_denoiser(velocity, in_t=True), z, times(n), callback=lambda i, z: states.append(z))
    states = torch.stack(states)
    slopes = -n * states.diff(dim=0)
    return states, slopes, states[:-1] - expand(times(n)[:-1], states) * slopes


def straightness(velocity, z, n=32):
    """How straight n Euler steps from z are: E |(z1 - z0) - v(z_t, t)|^2 over t, images and pixels (0: straight), and for each image
    the RMS distance of z_t from the line between its ends, (n + 1, B)."""
    states, slopes, _ = along_euler(velocity, z, n)
    s = expand(times(n), states)
    from_line = (states - s * states[0] - (1 - s) * states[-1]).square().flatten(2).mean(2).sqrt()
    return (states[0] - states[-1] - slopes).square().mean().item(), from_line.cpu()


# ---------------------------------------------------------------------------------------------------------------------- training

class Learner:
    """A net, its EMA, and one optimizer for the net and what is trained along with it."""

    def __init__(self, config, net, *more):
        self.config, self.net, self.ema = config, net, copy.deepcopy(net).eval().requires_grad_(False)
        self.trained = nn.ModuleList([net, *more])
        self.optimizer = torch.optim.Adam(self.trained.parameters(), fused=True)

    def update(self, i, loss_of, batch, lr):
        """Iteration i: a step down the mean loss of a batch, which it returns; then the EMA."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss = accumulate(loss_of, batch, self.config.batch_per_gpu)
        average_gradients(self.optimizer.param_groups[0]["params"])
        self.optimizer.step()
        ema_update(self.ema, self.net, min(self.config.ema, (1 + i) / (10 + i)))
        return loss

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in ("trained", "ema", "optimizer")}

    def load_state_dict(self, state):
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def make_net(config, data, encoder=False):
    if encoder:
        return Velocity(new_network(config, data, label_dim=0, model_channels=config.encoder_channels,
                                    num_blocks=min(2, config.num_blocks))[0], heads=2)
    return Velocity(new_network(config, data)[0], config.heads, config.phi if config.shakedrop else None)


def training_costs(config):
    """What each flow costs: iterations; evaluations of the net without and with a gradient; in forward passes, a gradient counting two.
    The encoder counts as if it were as large as the net. The longer run of the baseline has as many passes as CUD."""
    plain = 2 * config.heads - (config.dropout == 0) + (config.exact_rk and config.rk == "34")
    graded = 1 + (not config.independent)
    longer = round(config.steps * (plain + 3 * graded) / 3)
    rows = {"cud": (config.steps, plain, graded), "rectified-flow": (config.steps, 0, 1), "rectified-flow-equal-compute": (longer, 0, 1)}
    return {name: {"iterations": n, "forward": n * a, "forward_backward": n * b, "passes": n * (a + 3 * b)}
            for name, (n, a, b) in rows.items() if config.baseline or name == "cud"}


def train(config, run=None):
    """Train CUD, the baseline and the one-step student; return the EMA nets {row name: Velocity}."""
    run = run or Run("cud", config)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    per_rank, mine = run.rows(config.batch_size)
    shape = (data.channels, data.resolution, data.resolution)
    net = make_net(config, data).to(run.device, memory_format=torch.channels_last)
    encoder = [] if config.independent else [make_net(config, data, encoder=True).to(run.device, memory_format=torch.channels_last)]
    parts = {"stream": Stream(data, per_rank, config.seed, config.flip, run.rank, run.world), "cud": Learner(config, net, *encoder)}
    if config.baseline:
        parts.update(flow=Learner(config, copy.deepcopy(net)), halfway=copy.deepcopy(net).eval())
    if config.distill_steps:
        parts.update(student=Learner(config, copy.deepcopy(net)))
    cud, flow, halfway, student, stream = map(parts.get, ("cud", "flow", "halfway", "student", "stream"))
    prepare(config, *encoder, *(part.net for part in (cud, flow, student) if part))
    run.say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(data.images):,} images")
    first, begin = run.restore(parts), 0

    def iterations(length, what):
        """The next `length` iterations that are not done yet; all draws of a stage begin anew, so that both flows see the same."""
        nonlocal begin
        if first <= begin:
            torch.manual_seed(config.seed + 1)
            stream.position = 0
        start, begin = begin, begin + length
        for step in run.steps(max(first, start), begin, parts, what):
            yield step - start

    def draw():
        """x0, noise (B, C, H, W); t, h, labels (B,): the global batch is drawn on every rank, which takes its own rows."""
        t, u = torch.rand(2, config.batch_size, device=run.device)[:, mine]
        noise = torch.randn(config.batch_size, *shape, device=run.device)[mine]
        t = t * (1 - EPS) + EPS
        x0, labels = stream.next()
        return x0, noise, t, step_size(config.step_rule, t, u, config.tn), labels if config.conditional else None

    def quietly(z, t, **labels):
        net.eval()
        v = net(z, t, **labels)
        net.train()
        return v

    def cud_loss(i, x0, noise, t, h, labels):
        weights = (2 * i / config.steps, 2 - 2 * i / config.steps) if config.adaptive_weight else (1, 1)
        velocity = labelled(net, labels)
        quiet = None if config.dropout == 0 else velocity if config.target_dropout else labelled(quietly, labels)
        with autocast(run.device):
            z1, kl = encode(*encoder, x0, noise) if encoder else (noise, 0)
            return catch_up_loss(velocity, x0, z1, t, h, config.heads, weights, config.exact_rk, quiet) + config.kl_weight * kl

    for i in iterations(config.steps, "cud"):
        run.loss = cud.update(i, partial(cud_loss, i), draw(), config.lr * min(1, (i + 1) / max(1, config.warmup)))
    models = {"cud": cud.ema}

    if config.baseline:  # first as many iterations, then as many passes
        def baseline_loss(x0, noise, t, h, labels):
            with autocast(run.device):
                return flow_loss(labelled(flow.net, labels), x0, noise, t)

        for i in iterations(training_costs(config)["rectified-flow-equal-compute"]["iterations"], "rectified flow"):
            run.loss = flow.update(i, baseline_loss, draw(), config.lr * min(1, (i + 1) / max(1, config.warmup)))
            if i == config.steps - 1:
                halfway.load_state_dict(flow.ema.state_dict())
        models.update({"rectified-flow": halfway, "rectified-flow-equal-compute": flow.ema})

    if config.distill_steps:
        for own in (student.net, student.ema) if first <= begin else ():
            own.load_state_dict(cud.ema.state_dict())
        seeds = torch.arange(config.distill_n) + 10**9 * (config.seed + 1)  # the evaluation has 0, 1, ...
        z, labels = noise_from_seeds(seeds, shape, run.device).float(), labels_for(seeds, net.net.label_dim, run.device)
        own = torch.arange(config.distill_n, device=run.device)[share_of(config.distill_n)]
        targets = z.new_empty(len(own), 3, *shape)
        for i, target in zip(own.split(config.eval_batch), targets.split(config.eval_batch)):
            ahead = along_euler(of_head(labelled(cud.ema, None if labels is None else labels[i])), z[i], 16)[2]
            target.copy_(ahead[DISTILL_FROM,].transpose(0, 1))
        targets = gather_rows(targets)

        def student_loss(z, goal, labels):
            with autocast(run.device):
                return one_step_loss(labelled(student.net, labels), labelled(student.ema, labels), z, goal)

        for i in iterations(3 * config.distill_steps, "one step"):  # targets: (distill_n, 3, C, H, W)
            rows = torch.randint(config.distill_n, (config.batch_size,), device=run.device)[mine]
            batch = z[rows], targets[rows, i // config.distill_steps], None if labels is None else labels[rows]
            run.loss = student.update(i, student_loss, batch, config.distill_lr)
        models["cud-1step"] = student.ema
    return models


# -------------------------------------------------------------------------------------------------------------------- measurement

def evaluate(config, run, models, judge):
    """Every model at every budget from the same held-out noise (seeds 0 ... eval_n - 1): rows, curves and pictures."""
    def sampler(net, head, nfe):
        return lambda noise, labels: sample(of_head(labelled(net, labels), head), noise, nfe, config.solver, config.order, config.walk)

    shape, label_dim = models["cud"].net.img_shape, models["cud"].net.label_dim
    seeds = range(min(256, config.eval_n))
    noise, labels = noise_from_seeds(seeds, shape, run.device).float(), labels_for(seeds, label_dim, run.device)
    samplers, straight, bends = {}, {}, {}
    for name, net in models.items():
        head = config.head if name == "cud" else 1
        samplers.update({(name, nfe): sampler(net, head, nfe) for nfe in ((1,) if name == "cud-1step" else config.nfe)})
        straight[name], from_line = straightness(of_head(labelled(net, labels), head), noise)
        if name in ("cud", "rectified-flow"):
            lines = {"mean": from_line.mean(1), "image 0": from_line[:, 0], "image 1": from_line[:, 1 % len(noise)]}
            bends.update({f"{name}, {k}": (times(len(line) - 1).tolist(), line.tolist()) for k, line in lines.items()})
    rows, pictures = measure(samplers, config, shape, run.device, judge, label_dim)
    rows = [{**row, "straightness": straight[row["name"]]} for row in rows]
    if run.rank > 0:
        return rows
    curves = {name: tuple(zip(*[(row["nfe"], row["fid"]) for row in rows if row["name"] == name])) for name in models}
    pictures = {label.removeprefix("rectified-flow-"): images for label, images in pictures.items()}
    save_rows(run.out / "samples.png", pictures)
    save_curves(run.out / "fid.png", curves, "network evaluations", f"FID [{rows[0]['fid_features']}]", f"n = {config.eval_n}", log="xy")
    save_curves(run.out / "trajectories.png", bends, "t", "RMS distance from the straight line", f"{config.dataset}: trajectories")
    return rows


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("cud", config)
    judge = make_judge(config, run.device, unseen=True)
    models = train(config, run)
    results, costs = evaluate(config, run, models, judge), training_costs(config)
    run.metrics(results, teacher="none", training_cost=costs)
    run.say(table(results, ["name", "nfe", *SCORES, "straightness"]))
    run.say(table([{"name": name, **cost} for name, cost in costs.items()], ["name", *costs["cud"]]))
    run.say(f"{run.seconds():.0f} s; results in {run.out}: metrics.json, samples.png, fid.png, trajectories.png")


if __name__ == "__main__":
    cli(main)
