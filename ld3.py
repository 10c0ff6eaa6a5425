"""LD3: Learning to Discretize Denoising Diffusion ODEs (Tong et al., ICLR 2025, arXiv:2405.15506).

Idea: with few steps, *where* a solver evaluates the network matters as much as the
solver. LD3 trains the noise levels of the time grid, by backpropagation through the whole
solver, so that its samples match those of an accurate solver. The network is frozen.

Loss, for unit Gaussian noise z (trainer.py: loss 278-286, moved latents 473-489):
    hard:  E d(Psi_xi(sigma_max z), Psi(sigma_max z))
    soft:  E  min over z' with |z' - z| <= r  of  d(Psi_xi(sigma_max z'), Psi(sigma_max z))
Psi_xi is the solver with few steps on the grid xi = (theta1, theta2), see `TimeGrid`. Psi
is the teacher solver with many steps, d a distance of images, and r = 0.001 H W C / NFE^2
the radius of a ball around z. The paper's time t is our noise level sigma. The latents z
are drawn once: some for training, others for validation, others for the evaluation.

Differences from the paper and its official code (github.com/vinhsuhi/LD3, commit
9e4a66f). The official recipe, except for what has no flag:
    --start logsnr --distance lpips --objective soft --optimizer rmsprop --steps 175
    --theta1-steps 50 --train-n 50 --valid-n 50 --batch-size 2 --valid-every 1 --lr1 .005
    --lr2 .1
 1. Start: the hand-made grid that is best on the validation latents (theirs: logsnr; in
    time mode, uniform). If nothing better is found on these, the result is the start.
 2. Small data: the hard objective, d the mean square, Adam with learning rates that fall
    to 0, 400 training and 256 validation latents. Large data: soft and RMSprop as theirs.
 3. d for large data: LPIPS if it is installed (theirs: always), else classifier features.
 4. The shifts theta2 reach half the smallest gap of the grid (theirs, in lambda mode:
    half the smallest difference of the logits theta1, which is 0 at first: no shift).
 5. Validation latents stay (theirs are moved too, so their validation loss is biased
    low). The latents' learning rate is halved after a round in which no training latent
    moved (theirs: no validation latent). As in theirs, a move is kept if the moved latent
    on the new grid has a lower loss than the unmoved one on the old grid.
 6. UniPC is differentiated through all its coefficients (theirs detaches the ratios r_i).
 7. After five validations without progress the best grid is reloaded and both learning
    rates fall (theirs: not at the first such plateau, theta2's not before it is trained;
    also, each round begins at the best grid, and the lowest learning rate ends training).
 8. Incomplete batches at the end of a round are left out (theirs: used).
Digits, 5 evaluations, three seeds: RMSE to the teacher .082 (cosine grid) -> .075 +- .003.
    python ld3.py                             # digits: a minute on 2 CPU cores
    python ld3.py --solver dpmpp --nfe 8      # another solver
    python ld3.py --steps 0 --schedule runs/ld3-digits/schedule.json  # only measure
    python ld3.py --dataset cifar10 --nfe 10  # one GPU. More: RESULTS.md
"""
import copy
import importlib.util
import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.classifier import make_distance
from common.diffusion import GRIDS, noise_from_seeds, sigma_grid, with_labels
from common.fid import labels_for, make_evaluator, measure
from common.machinery.options import SolverOptions, cli, complete, option, parse_config, require
from common.machinery.plots import save_rows, save_sigma_grids
from common.machinery.ranks import from_first_rank
from common.machinery.run import Run, State
from common.machinery.schedule import load_schedule, save_schedule
from common.solvers import ORDERS, SOLVERS, steps_for, unipc
from common.teacher import load_teacher

# --- the method


class TimeGrid(nn.Module):
    """theta1, theta2 (n+1,) -> sigmas, sigmas_net (n+1,), decreasing from sigma_max to sigma_min.

    sigmas is the solver's grid: cumsum(softmax(theta1)), normalized to 0 ... 1 and spread over
    the range of lambda = -log sigma or, in time mode, over that of sigma itself. sigmas_net are
    the conditioning noise levels, the second argument of the denoiser: the inner ones are
    shifted from the grid by theta2 ("decoupled"), by at most half the grid's smallest gap.
    """

    def __init__(self, n, sigma_min=0.002, sigma_max=80.0, mode="lambda"):
        super().__init__()
        self.mode = mode
        self.ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
        self.theta1 = nn.Parameter(torch.ones(n + 1, dtype=torch.float64))
        self.theta2 = nn.Parameter(torch.zeros(n + 1, dtype=torch.float64))

    def window(self, levels):
        """The largest shift, half the smallest gap: a limit, through which no gradient flows."""
        return levels.detach().diff().abs().min() / 2

    def forward(self):
        q = self.theta1.softmax(0).cumsum(0)  # (n+1,), increasing
        u = (q - q[0]) / (q[-1] - q[0])  # 0 ... 1
        if self.mode == "lambda":
            lambda_min, lambda_max = -self.ends.log()
            levels = lambda_min + (lambda_max - lambda_min) * u  # lambda, increasing
        else:
            sigma_max, sigma_min = self.ends
            levels = sigma_min + (sigma_max - sigma_min) * u.flip(0)  # sigma, decreasing
        w = self.window(levels)
        inner = levels[1:-1] + self.theta2[1:-1].clamp(-w, w)
        levels_net = torch.cat([levels[:1], inner, levels[-1:]])
        if self.mode == "lambda":
            return (-levels).exp(), (-levels_net).exp()
        return levels, levels_net

    @torch.no_grad()
    def set_to(self, sigmas, sigmas_net):
        """Set theta1 and theta2 to a given grid: the log of its gaps inverts the softmax."""
        levels, levels_net = sigmas, sigmas_net
        if self.mode == "lambda":
            levels, levels_net = -sigmas.log(), -sigmas_net.log()
        logits = levels.diff().abs().log()  # (n,)
        if self.mode == "time":
            logits = logits.flip(0)  # there the softmax runs from the smallest sigma upwards
        self.theta1[1:] = logits - logits.mean() + 1  # theta1[0] cancels in u
        self.theta2.copy_(levels_net - levels)


def distillation_loss(solver, denoiser, x, target, sigmas, sigmas_net, distance):
    """d(Psi_xi(x), target), (B,), where target = Psi(x) are the teacher solver's samples.

    x, target: (B, C, H, W); sigmas, sigmas_net: (n+1,), the grid xi.
    """
    return distance(solver(denoiser, x, sigmas, sigmas_net=sigmas_net), target)


def project(moved, origin, radius):
    """The points nearest to the latents `moved` with |z' - z| <= radius, z = `origin`."""
    offset = moved - origin  # (B, C, H, W), unit variance
    norm = offset.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return origin + offset * (radius / norm).clamp_max(1)


@torch.no_grad()
def teacher_samples(config, denoiser, noise):
    """Psi: unit Gaussian noise (B, C, H, W) -> the accurate solution of the same ODE, x0."""
    sigmas = sigma_grid("edm", config.teacher_nfe, config.sigma_min, config.sigma_max)
    return unipc(denoiser, config.sigma_max * noise, sigmas, order=3)


# --- options

DISTANCES, OPTIMIZERS = ("l2", "rms", "features", "lpips"), ("adam", "rmsprop")


@dataclass
class Config(SolverOptions):
    nfe: int = option(5, "network evaluations (paper: 4 to 10)", low=1)
    solver: str = option("unipc", "the student's solver", choices=tuple(SOLVERS))
    order: int | None = option(None, "its order (default, paper: 3, or its highest)")
    variant: str = option("bh1", "unipc's (latent models: bh2)", choices=("bh1", "bh2"))
    teacher_nfe: int = option(20, "of the teacher solver, UniPC-3, edm grid (official)", low=1)
    mode: str = option("lambda", "lambda or sigma (official)", choices=("lambda", "time"))
    start: str = option("auto", "hand-made grid; auto: the best", choices=("auto", *GRIDS))
    schedule: str | None = option(None, "schedule.json to start from instead")
    objective: str | None = option(None, "soft: latents move", choices=("soft", "hard"))
    times: str = option("decoupled", "learn theta2?", choices=("decoupled", "coupled"))
    distance: str | None = option(None, "d of the loss", choices=DISTANCES)
    optimizer: str | None = option(None, "of the grid (official: rmsprop)", choices=OPTIMIZERS)
    steps: int | None = option(None, "updates; 0: only measure (official: 175)", low=0)
    theta1_steps: int | None = option(None, "updates before theta2's (official: 50)", low=0)
    train_n: int | None = option(None, "training latents (official: 50)", low=1)
    valid_n: int | None = option(None, "validation latents (official: 50)", low=1)
    batch_size: int | None = option(None, "latents per update (official: 2)", low=1)
    valid_every: int | None = option(None, "updates per validation (official: 1)", low=1)
    lr1: float | None = option(None, "learning rate of theta1 (official: 5e-3)", above=0)
    lr2: float | None = option(None, "of theta2; SGD's is over NFE (official: 0.1)", above=0)
    lr_latent: float = option(12.0, "of the latents, over NFE (official)", above=0)
    radius: float = option(0.001, "of their ball, times H W C / NFE^2 (official)", low=0)
    checkpoint: bool = option(False, "recompute evaluations in the backward pass")

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        self.n = steps_for(self.solver, self.nfe)
        orders = ORDERS[self.solver]
        self.order = self.order or min(3, orders[-1])
        require(self.order in orders, "order", self.order, f"{self.solver} offers {orders}")
        message = f"must be at least --batch-size {self.batch_size}"
        require(self.train_n >= self.batch_size, "train_n", self.train_n, message)
        # The grids to start from, {name: (sigmas, sigmas_net)}.
        kinds = GRIDS if self.start == "auto" else (self.start,)
        self.starts = {kind: (self.grid(kind), self.grid(kind)) for kind in kinds}
        if self.schedule:
            self.starts = {self.schedule: load_schedule(self.schedule, self.grid("edm"))}
        if self.steps and self.times == "coupled":
            self.starts = {kind: (sigmas, sigmas) for kind, (sigmas, _) in self.starts.items()}

    def grid(self, kind):
        return sigma_grid(kind, self.n, self.sigma_min, self.sigma_max)

    def student(self):
        options = {"variant": self.variant} if self.solver == "unipc" else {}
        return partial(SOLVERS[self.solver], order=self.order, **options)


# Large data: the official values for pixel models (configs/cifar10.yml, trainer.py and
# utils.py), except --start auto (theirs: logsnr) and --valid-every 5 (theirs: 1). The
# official values for latent models: --mode time --variant bh2 --batch-size 1 --lr2 .001
# --steps 250 --theta1-steps 100.
_LARGE = dict(
    distance="lpips" if importlib.util.find_spec("lpips") else "features", objective="soft",
    optimizer="rmsprop", steps=175, theta1_steps=50, train_n=50, valid_n=50, batch_size=2,
    valid_every=5, lr1=5e-3, lr2=0.1, eval_n=50_000, eval_batch=256,
)
_SMALL = dict(
    distance="l2", objective="hard", optimizer="adam", steps=50, theta1_steps=0, train_n=400,
    valid_n=256, batch_size=40, valid_every=10, lr1=0.05, lr2=0.05, eval_n=1024, eval_batch=256,
)
PRESETS = {
    "digits": _SMALL,
    "mnist": {**_SMALL, "eval_batch": 32},
    "cifar10": {**_SMALL, "eval_batch": 64},
    "cifar10-gpu": _LARGE,
    "imagenet64": {**_LARGE, "eval_batch": 128},
    "folder": {**_SMALL, "eval_n": 500, "eval_batch": 50},
    "folder-gpu": {**_LARGE, "eval_n": 10_000},
}
SMOKE = dict(
    steps=4, theta1_steps=2, train_n=4, valid_n=2, batch_size=2, valid_every=2, eval_n=32,
    eval_batch=32,
)


# --- training


def train(config, run, teacher, distance):
    """Learn the grid: sigmas, sigmas_net (n+1,).

    It is the start if nothing better is found on the validation latents. Under torchrun
    all ranks do the same.
    """
    grid = TimeGrid(config.n, config.sigma_min, config.sigma_max, config.mode)
    solver = config.student()
    radius = config.radius * torch.Size(teacher.net.img_shape).numel() / config.nfe**2

    # Training latents, then validation latents; the evaluation has the seeds 0, 1, 2, ...
    indices = torch.arange(config.train_n + config.valid_n, device=run.device)
    seeds = indices + 10**6 * (config.seed + 1)
    origin = noise_from_seeds(seeds, teacher.net.img_shape, run.device)  # z (M, C, H, W)

    def denoiser_for(i):
        return with_labels(teacher, labels_for(seeds[i], teacher.net.label_dim, run.device))

    batches = indices.split(config.eval_batch)
    target = torch.cat([teacher_samples(config, denoiser_for(i), origin[i]) for i in batches])

    def loss_fn(latents, i):
        denoiser = denoiser_for(i)
        if config.checkpoint:
            denoiser = partial(checkpoint, denoiser, use_reentrant=False)
        x = config.sigma_max * latents
        return distillation_loss(solver, denoiser, x, target[i], *grid(), distance)  # (B,)

    @torch.no_grad()
    def validate():
        """The loss of each validation latent, (V,): grids are compared on the same ones."""
        batches = indices[config.train_n :].split(config.eval_batch)
        return torch.cat([loss_fn(origin[i], i) for i in batches]).double()

    start_losses = {}
    for kind, levels in config.starts.items():
        grid.set_to(*levels)
        start_losses[kind] = validate()
    start = min(start_losses, key=lambda kind: start_losses[kind].mean())
    grid.set_to(*config.starts[start])
    if config.optimizer == "adam":
        optimizer1 = torch.optim.Adam([grid.theta1], config.lr1)
        optimizer2 = torch.optim.Adam([grid.theta2], config.lr2)
    else:
        optimizer1 = torch.optim.RMSprop([grid.theta1], config.lr1, momentum=0.9)
        optimizer2 = torch.optim.SGD([grid.theta2], config.lr2 / config.nfe)
    state = State(
        best=copy.deepcopy(grid.state_dict()), losses=start_losses[start], no_progress=0,
        latents=origin[: config.train_n].clone(), lr_latent=config.lr_latent / config.nfe,
        moved=origin.new_zeros(()),
    )
    run.resume(grid=grid, optimizer1=optimizer1, optimizer2=optimizer2, state=state)
    in_round = config.train_n // config.batch_size  # updates in a round over the latents
    for step in run.steps(config.steps, "learning the grid"):
        rng = torch.Generator().manual_seed(config.seed * 10**6 + step // in_round)
        order = torch.randperm(config.train_n, generator=rng).to(run.device, non_blocking=True)
        first = step % in_round * config.batch_size
        i = order[first : first + config.batch_size]
        latents = state.latents[i].requires_grad_(config.objective == "soft")
        losses = loss_fn(latents, i)  # (B,)
        run.loss = losses.mean()
        grid.zero_grad()
        run.loss.backward()
        for theta in grid.parameters():
            nn.utils.clip_grad_norm_(theta, 1.0)
        if config.optimizer == "adam":
            decay = (1 + math.cos(math.pi * step / config.steps)) / 2
            optimizer1.param_groups[0]["lr"] = decay * config.lr1
            optimizer2.param_groups[0]["lr"] = decay * config.lr2
        optimizer1.step()
        if step >= config.theta1_steps and config.times == "decoupled":
            optimizer2.step()

        if config.objective == "soft":
            with torch.no_grad():  # the moved latent, new grid; the unmoved one, old grid
                moved = project(latents - state.lr_latent * latents.grad, origin[i], radius)
                better = loss_fn(moved, i) < losses
                state.latents[i] = torch.where(better.view(-1, 1, 1, 1), moved, latents)
                state.moved += better.sum()
            if (step + 1) % in_round == 0:  # the end of a round
                if state.moved == 0:  # in which no latent moved
                    state.lr_latent /= 2
                state.moved.zero_()

        if (step + 1) % config.valid_every == 0 or step + 1 == config.steps:
            losses = validate()
            run.log(step=step, validation=losses.mean().item())
            state.no_progress += 1
            if losses.mean() < state.losses.mean():
                state.best, state.losses = copy.deepcopy(grid.state_dict()), losses
                state.no_progress = 0
            if state.no_progress == 5 and config.optimizer == "rmsprop":
                # Reload the best grid, both learning rates x 0.8, down to a lowest one.
                state.no_progress = 0
                grid.load_state_dict(state.best)
                for optimizer, lowest in ((optimizer1, 5e-5), (optimizer2, 1e-6)):
                    group, = optimizer.param_groups
                    if group["lr"] > lowest:
                        group["lr"] = max(0.8 * group["lr"], lowest)

    gain = start_losses[start] - state.losses  # (V,), paired
    error = gain.std(correction=0).item() / len(gain) ** 0.5
    run.say(f"validation: {start} {start_losses[start].mean():.5f}, learned "
            f"{state.losses.mean():.5f}, paired difference {gain.mean():.5f} +- {error:.5f}")
    if gain.mean() <= 0:
        run.say(f"nothing better than the start was found: the row ld3 is the {start} grid")
        return config.starts[start]
    grid.load_state_dict(state.best)
    with torch.no_grad():
        return tuple(from_first_rank(levels) for levels in grid())


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("ld3", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    distance = make_distance(config, run.device) if config.steps else None
    evaluator = make_evaluator(config, run.device)
    grids = {kind: (config.grid(kind), None) for kind in GRIDS}
    if config.steps:
        grids["ld3"] = train(config, run, teacher, distance)
        save_schedule(run.out / "schedule.json", *grids["ld3"], **asdict(config))
    elif config.schedule:
        grids["ld3"] = config.starts[config.schedule]

    solver = config.student()

    def student(noise, labels, grid):
        x, (sigmas, sigmas_net) = config.sigma_max * noise, grid
        return solver(with_labels(teacher, labels), x, sigmas, sigmas_net=sigmas_net)

    samplers = {(name, config.nfe): partial(student, grid=grid) for name, grid in grids.items()}
    samplers["teacher", config.teacher_nfe] = lambda noise, labels: teacher_samples(
        config, with_labels(teacher, labels), noise
    )
    rows, pictures = measure(run, samplers, teacher.net, evaluator, reference="teacher")
    save_rows(run.out / "samples.png", pictures)
    save_sigma_grids(run.out / "grids.png", grids, f"{config.dataset}, {config.solver}")
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
