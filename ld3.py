"""LD3: Learning to Discretize Denoising Diffusion ODEs (Tong et al., ICLR 2025, arXiv:2405.15506).

Idea: with few steps, *where* a solver evaluates the network matters as much as the solver. LD3
trains the noise levels of the time grid, by backpropagation through the whole solver, so that
its samples match those of an accurate teacher solver. The network is frozen.

Loss (soft objective, trainer.py:216), x_T ~ N(0, I); the hard one has x'_T = x_T:
    E  min over x'_T with |x'_T - x_T| <= r  of  d(Psi_xi(sigma_max x'_T), Psi(sigma_max x_T))
Psi_xi: the few-step solver on the grid xi = (theta1, theta2); Psi: the teacher solver;
d: a distance of images; r = 0.001 H W C / N^2. The paper's t is our sigma.

Differences from the paper and its official code (github.com/vinhsuhi/LD3, commit 9e4a66f):
 1. The window of theta2: half the smallest gap of the grid (theirs, in lambda mode: of the
    logits theta1, which are equal at first: decoupling starts late).
 2. Validation latents never move (theirs do: optimistic).
 3. UniPC is differentiated through all its coefficients (theirs detaches the ratios r_i).
 4. d: LPIPS if installed (theirs), else classifier features; small data: l2.
 5. Validation every 5 updates; a plateau is 5 validations (theirs: 1 and 5 updates). Theirs
    also reloads the best grid every round, keeps the rates at the first plateau, lowers
    theta2's in phase 2 only, and trains on the last, partial batch of a round.
 6. digits: 100 training latents, batches of 10, rate of theta2 2 / N (theirs: 50, 2, 0.1 / N).
Digits, 5 evaluations: RMSE to the teacher .342 (best hand-made grid) -> .104.
    python ld3.py                             # digits: 30 s on 2 CPU cores
    python ld3.py --solver dpmpp --nfe 8      # another solver
    python ld3.py --steps 0 --schedule runs/ld3-digits/schedule.json  # only measure
    python ld3.py --dataset cifar10 --nfe 10  # one GPU. More: RESULTS.md
"""
import copy
import importlib.util
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.classifier import load_classifier
from common.diffusion import GRIDS, noise_from_seeds, sigma_grid, with_labels
from common.fid import labels_for, make_evaluator, measure
from common.machinery.diffusers_export import check_export, export_grid
from common.machinery.files import pretrained
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

    sigmas, the solver's grid: cumsum(softmax(theta1)), normalized and spread over the range of
    lambda = -log sigma or, in time mode, of sigma. sigmas_net, the conditioning noise levels: the
    grid shifted by theta2 ("decoupled"), by at most half its smallest gap.
    """

    def __init__(self, n, sigma_min=0.002, sigma_max=80.0, mode="lambda"):
        super().__init__()
        self.mode = mode
        self.ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
        self.theta1 = nn.Parameter(torch.ones(n + 1, dtype=torch.float64))
        self.theta2 = nn.Parameter(torch.zeros(n + 1, dtype=torch.float64))

    def window(self, levels):
        return levels.detach().diff().abs().min() / 2

    def forward(self):
        q = self.theta1.softmax(0).cumsum(0)  # (n+1,), increasing
        u = (q - q[0]) / (q[-1] - q[0])  # 0 ... 1
        if self.mode == "lambda":
            first, last = -self.ends.log()
            levels = first + (last - first) * u  # lambda, increasing
        else:
            last, first = self.ends
            levels = first + (last - first) * u.flip(0)  # sigma, decreasing
        w = self.window(levels)
        inner = levels[1:-1] + self.theta2[1:-1].clamp(-w, w)
        levels_net = torch.cat([levels[:1], inner, levels[-1:]])
        if self.mode == "lambda":
            return (-levels).exp(), (-levels_net).exp()
        return levels, levels_net

    @torch.no_grad()
    def set_to(self, sigmas, sigmas_net):
        """Take over a grid: theta1 = log of its gaps inverts the softmax; theta2 = shifts."""
        if self.mode == "lambda":
            sigmas, sigmas_net = -sigmas.log(), -sigmas_net.log()
        logits = sigmas.diff().abs().log()
        logits = logits if self.mode == "lambda" else logits.flip(0)
        self.theta1[1:] = logits - logits.mean() + 1  # theta1[0] cancels in u
        self.theta2.copy_(sigmas_net - sigmas)


def distillation_loss(solver, denoiser, x, target, sigmas, sigmas_net, distance):
    """d(Psi_xi(x), target), (B,). x, the teacher's samples `target`: (B, C, H, W)."""
    return distance(solver(denoiser, x, sigmas, sigmas_net=sigmas_net), target)


def project(moved, origin, radius):
    """The point nearest to `moved` with |x - origin| <= radius (2-norm of a latent)."""
    offset = moved - origin  # (B, C, H, W), unit variance
    norm = offset.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return origin + offset * (radius / norm).clamp_max(1)


def feature_distance(classifier, x, y):
    """(B,): LPIPS without learned weights, on normalized activations."""
    maps = zip(classifier.feature_maps(x.float()), classifier.feature_maps(y.float()))
    pairs = [(F.normalize(a, dim=1), F.normalize(b, dim=1)) for a, b in maps]  # (B, c, h, w)
    return sum((a - b).square().sum(1).flatten(1).mean(1) for a, b in pairs)


@torch.no_grad()
def teacher_samples(config, denoiser, noise):
    """Psi: unit Gaussian noise (B, C, H, W) -> the accurate solution of the same ODE."""
    sigmas = sigma_grid("edm", config.teacher_nfe, config.sigma_min, config.sigma_max)
    return unipc(denoiser, config.sigma_max * noise, sigmas, order=3)


# --- options


@dataclass
class Config(SolverOptions):
    nfe: int = option(5, "network evaluations (paper: 4 to 10)", low=1)
    solver: str = option("unipc", "the student's solver", choices=tuple(SOLVERS))
    order: int | None = option(None, "its order (default, paper: 3, or its highest)")
    teacher_nfe: int = option(20, "of the teacher, UniPC-3, edm grid (official)", low=1)
    mode: str = option("lambda", "what is learned (official)", choices=("lambda", "time"))
    schedule: str | None = option(None, "grid to start from (default: logsnr; time: uniform)")
    objective: str = option("soft", "do training latents move?", choices=("soft", "hard"))
    times: str = option("decoupled", "learn theta2 or not", choices=("decoupled", "coupled"))
    distance: str | None = option(None, "d of the loss", choices=("l2", "features", "lpips"))
    steps: int | None = option(None, "updates; 0: only measure (official: 175)", low=0)
    theta1_steps: int | None = option(None, "of these, theta1 only (official: 50)", low=0)
    train_n: int | None = option(None, "training latents (official: 50)", low=1)
    valid_n: int | None = option(None, "validation latents (official: 50)", low=1)
    batch_size: int | None = option(None, "latents per update (official: 2)", low=1)
    lr1: float | None = option(None, "rate, theta1, RMSprop (official: 5e-3)", above=0)
    lr2: float | None = option(None, "theta2, SGD, by 1 / N (official: 0.1)", above=0)
    lr_latent: float | None = option(None, "of latents, by 1 / N (official: 12)", above=0)
    radius: float = option(0.001, "of the ball, times H W C / N^2 (official)", low=0)
    export: str | None = option(None, "folder for diffusers: the grid as a scheduler of its own")
    checkpoint: bool = option(False, "recompute evaluations in the backward pass")

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        self.n = steps_for(self.solver, self.nfe)
        orders = ORDERS[self.solver]
        self.order = self.order or min(3, orders[-1])
        require(self.order in orders, "order", self.order, f"{self.solver} offers {orders}")
        right = f"must be at least --batch-size {self.batch_size}"
        require(self.train_n >= self.batch_size, "train_n", self.train_n, right)
        found = importlib.util.find_spec("lpips")
        self.distance = self.distance or ("lpips" if found else "features")
        start = self.grid("logsnr" if self.mode == "lambda" else "uniform")
        self.start = load_schedule(self.schedule, start) if self.schedule else (start, start)
        check_export(self)

    def grid(self, kind):
        return sigma_grid(kind, self.n, self.sigma_min, self.sigma_max)


# Official: configs/*.yml, trainer.py, utils.py.
_OFFICIAL = dict(
    steps=175, theta1_steps=50, train_n=50, valid_n=50, batch_size=2, lr1=5e-3, lr2=0.1,
    lr_latent=12.0, eval_n=50_000, eval_batch=256,
)
_SMALL = dict(distance="l2", train_n=100, batch_size=10, lr2=2.0, eval_n=1024)
PRESETS = {
    "digits": {**_OFFICIAL, **_SMALL},
    "mnist": {**_OFFICIAL, **_SMALL, "eval_batch": 32},
    "cifar10": _OFFICIAL,
    "imagenet64": {**_OFFICIAL, "eval_batch": 128},
    "folder": {**_OFFICIAL, **_SMALL, "eval_n": 500, "eval_batch": 50},
    "folder-gpu": {**_OFFICIAL, "eval_n": 10_000},
}
SMOKE = dict(
    steps=4, theta1_steps=2, train_n=4, valid_n=2, batch_size=2, eval_n=32, eval_batch=32
)


def make_distance(config, device):
    """d(x, y) -> (B,) for images (B, C, H, W) in [-1, 1]."""
    if config.distance == "l2":
        return lambda x, y: (x - y).square().flatten(1).mean(1)
    if config.distance == "features":
        steps = config.classifier_steps
        classifier = load_classifier(config.dataset, device, 0, config.data_dir, steps)
        return partial(feature_distance, classifier)
    load = lambda: importlib.import_module("lpips").LPIPS(net="vgg", verbose=False)
    vgg = pretrained(load, "distance lpips", "choose l2 or features").to(device)
    vgg.eval().requires_grad_(False)
    return lambda x, y: vgg(*(z.float().expand(-1, 3, -1, -1) for z in (x, y))).flatten()


# --- training


def train(config, run, teacher, distance):
    """Learn the grid: sigmas, sigmas_net (n+1,). Under torchrun all ranks do the same."""
    grid = TimeGrid(config.n, config.sigma_min, config.sigma_max, config.mode)
    sigmas, sigmas_net = config.start
    grid.set_to(sigmas, sigmas_net if config.times == "decoupled" else sigmas)
    solver = partial(SOLVERS[config.solver], order=config.order)
    radius = config.radius * torch.Size(teacher.net.img_shape).numel() / config.n**2

    # Training, then validation latents; the evaluation has the seeds 0, 1, 2, ...
    rows = torch.arange(config.train_n + config.valid_n, device=run.device)
    seeds = rows + 10**6 * (config.seed + 1)
    origin = noise_from_seeds(seeds, teacher.net.img_shape, run.device)  # (M, C, H, W)

    def model(i):
        return with_labels(teacher, labels_for(seeds[i], teacher.net.label_dim, run.device))

    parts = rows.split(config.eval_batch)
    target = torch.cat([teacher_samples(config, model(i), origin[i]) for i in parts])

    def loss_fn(latents, i):
        denoiser = model(i)
        if config.checkpoint:
            denoiser = partial(checkpoint, denoiser, use_reentrant=False)
        x = config.sigma_max * latents
        return distillation_loss(solver, denoiser, x, target[i], *grid(), distance)  # (B,)

    @torch.no_grad()
    def validate():
        parts = rows[config.train_n :].split(config.eval_batch)
        return torch.cat([loss_fn(origin[i], i) for i in parts]).double().mean().item()

    optimizer1 = torch.optim.RMSprop([grid.theta1], config.lr1, momentum=0.9)
    optimizer2 = torch.optim.SGD([grid.theta2], config.lr2 / config.n)
    state = State(latents=origin[: config.train_n].clone(), lr_latent=config.lr_latent / config.n)
    vars(state).update(moved=origin.new_zeros(()), loss=validate(), bad=0)
    state.best = copy.deepcopy(grid.state_dict())
    run.resume(grid=grid, optimizer1=optimizer1, optimizer2=optimizer2, state=state)
    batches = config.train_n // config.batch_size
    for step in run.steps(config.steps, "learning the grid"):
        rng = torch.Generator().manual_seed(config.seed * 10**6 + step // batches)
        order = torch.randperm(config.train_n, generator=rng).to(run.device, non_blocking=True)
        i = order[step % batches * config.batch_size :][: config.batch_size]
        latents = state.latents[i].requires_grad_(config.objective == "soft")
        losses = loss_fn(latents, i)  # (B,)
        run.loss = losses.mean()
        grid.zero_grad()
        run.loss.backward()
        for theta in grid.parameters():
            nn.utils.clip_grad_norm_(theta, 1.0)
        optimizer1.step()
        if step >= config.theta1_steps and config.times == "decoupled":
            optimizer2.step()

        if config.objective == "soft":  # keep a move if it lowers the loss on the new grid
            with torch.no_grad():
                moved = project(latents - state.lr_latent * latents.grad, origin[i], radius)
                better = loss_fn(moved, i) < losses
                state.latents[i] = torch.where(better.view(-1, 1, 1, 1), moved, latents)
                state.moved += better.sum()
            if (step + 1) % batches == 0:  # a round is over: halve the rate if none moved
                state.lr_latent /= 1 if state.moved else 2
                state.moved.zero_()

        if (step + 1) % 5 == 0 or step + 1 == config.steps:
            loss = validate()
            run.log(step=step, validation=loss)
            state.bad += 1
            if loss < state.loss:
                state.best, state.loss, state.bad = copy.deepcopy(grid.state_dict()), loss, 0
            if state.bad == 5:  # a plateau: back to the best, slower
                state.bad = 0
                grid.load_state_dict(state.best)
                for optimizer, floor in ((optimizer1, 5e-5), (optimizer2, 1e-6)):
                    group, = optimizer.param_groups
                    group["lr"] = min(group["lr"], max(0.8 * group["lr"], floor))
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
        about = {k: getattr(config, k) for k in ("solver", "order", "nfe", "dataset")}
        save_schedule(run.out / "schedule.json", *grids["ld3"], **about)
    elif config.schedule:
        grids["ld3"] = config.start
    export_grid(config, teacher, *grids.get("ld3", (None, None)))

    solver = partial(SOLVERS[config.solver], order=config.order)

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
