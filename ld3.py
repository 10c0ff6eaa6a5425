"""LD3: Learning to Discretize Denoising Diffusion ODEs (Tong et al., ICLR 2025, arXiv:2405.15506).

Idea: with few steps, *where* a solver evaluates the network matters as much as the solver. LD3 freezes the network, makes the N + 1
noise levels of the walk learnable, and trains them by backpropagation through the whole solver so that its samples match those of a
slow, accurate teacher solver started from the same noise. Minutes of training, some tens of latents, one number per level.

Loss: L(xi) = E over x_T of  min over x'_T with |x'_T - x_T| <= r  of  d( Psi_xi(sigma_max x'_T), Psi_teacher(sigma_max x_T) )
    the *soft* objective (the hard one has x'_T = x_T): the student need not hit the teacher's sample from exactly the same noise.
    Psi_xi is a few-step solver on the levels xi, d a distance of images, x_T ~ N(0, I), r = 0.001 H W C / N^2.
    xi has two parts: theta1 gives the levels of the walk, theta2 the levels *told to the network* at each of them ("decoupled").
The paper's t is our sigma (EDM's time), its lambda is -log sigma.

Differences from the paper and its official code (github.com/vinhsuhi/LD3, commit 9e4a66f):
 1. The window of theta2 is half the smallest gap of the *grid*, in either mode. Theirs, in lambda mode, takes the smallest gap of the raw
    logits theta1, which is 0 at the start: there decoupling is off until the logits have moved apart.
 2. Validation noise is never moved (theirs is relaxed like the training noise, so their validation loss is optimistic). Their rule
    "halve the latent rate if no validation latent moved" therefore looks at the training latents of a round.
 3. UniPC is differentiated through all its coefficients (theirs detaches the ratios r_i).
 4. d: LPIPS where the `lpips` package and its weights are there; else l2, l1, or the features of the data set's own classifier.
 5. Presets of digits: 100 training latents, batches of 10, rate of theta2 2 / N (official: 50, 2, 0.1 / N).
Measured: digits, RMSE to the teacher, best of four hand-made grids -> LD3; 1,024 held-out seeds, one training seed, about a minute each
    nfe   unipc (3)      dpmpp (3)      ipndm (3)      euler
      3   .272 -> .149   .269 -> .165   .257 -> .207   .315 -> .188
      5   .342 -> .104   .175 -> .095   .177 -> .100   .219 -> .131
      8   .114 -> .063   .114 -> .060   .108 -> .043   .177 -> .094
    FID in the features of the digits classifier is below that of every hand-made grid in all twelve (README). Three training seeds,
    unipc, 5 evaluations: .098 +- .007; hard .095 +- .010; coupled .101 +- .017; distance of features .100 +- .008; 100 r: .132 +- .006.
    python ld3.py                                          # digits, 5 evaluations: 29 s on 2 CPU cores
    python ld3.py --solver dpmpp --order 2 --nfe 8         # another solver, another budget
    python ld3.py --schedule runs/ld3-digits/schedule.json --steps 0   # measure a saved schedule, train nothing
    python ld3.py --dataset cifar10 --nfe 10                           # one GPU
"""
import importlib.util
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.classifier import load_classifier
from common.diffusion import GRIDS, check_grid, sigma_grid, with_labels
from common.fid import labels_for, make_judge, measure
from common.plots import save_rows, save_sigma_grids
from common.solvers import ORDERS, SOLVERS, steps_for
from common.teacher import load_teacher
from common.training import (SCORES, Options, Run, UsageError, average_gradients, cli, fill_from_presets, gather_rows, noise_from_seeds,
                             option, parse_config, require, save_json, share_of, sum_over_ranks, table)


@dataclass
class Config(Options):
    teacher: str | None = option(None, "teacher checkpoint (default: the data set's own)")
    nfe: int = option(5, "network evaluations of the student (paper: 4 to 10)")
    solver: str = option("unipc", "the student's solver (paper: unipc, dpmpp, ipndm)", choices=tuple(SOLVERS))
    order: int | None = option(None, "its order (default: 3 or the highest it has; paper: 3)")
    variant: str = option("bh1", "unipc's B(h) (paper: bh1 for pixels, bh2 for latents)", choices=("bh1", "bh2"))
    teacher_solver: str = option("unipc", "the teacher's solver (official scripts: unipc)", choices=tuple(SOLVERS))
    teacher_nfe: int = option(20, "its network evaluations (official scripts: 20)")
    teacher_grid: str = option("edm", "its time grid (official scripts: edm)", choices=GRIDS)
    sigma_min: float = option(0.002, "lowest noise level (EDM)")
    sigma_max: float = option(80.0, "highest noise level (EDM)")
    mode: str = option("lambda", "learn levels in lambda = -log sigma or in sigma ('time'); official EDM configs: lambda",
                       choices=("lambda", "time"))
    init: str | None = option(None, "start from this hand-made grid (default: logsnr in lambda mode, uniform in time mode)", choices=GRIDS)
    objective: str = option("soft", "soft: training latents may move inside a ball; hard: they stay", choices=("soft", "hard"))
    times: str = option("decoupled", "decoupled: learn theta2 as well; coupled: theta2 stays 0", choices=("decoupled", "coupled"))
    distance: str | None = option(None, "d of the loss", choices=("l2", "l1", "features", "lpips"))
    steps: int | None = option(None, "updates; 0 only evaluates (official: 7 rounds of 25)")
    theta1_steps: int | None = option(None, "of these, the first so many move theta1 only (official: 2 rounds of 25)")
    train_n: int | None = option(None, "training latents (official: 50)")
    valid_n: int | None = option(None, "validation latents, never moved (official: 50)")
    batch_size: int | None = option(None, "latents per update (official: 2)")
    valid_every: int = option(5, "updates between validations")
    lr1: float | None = option(None, "rate of theta1, RMSprop with momentum 0.9 (official: 5e-3)")
    lr2: float | None = option(None, "rate of theta2, SGD, divided by N (official: 0.1 for pixels, 0.001 for latent models)")
    lr_latent: float | None = option(None, "rate of the latents, SGD, divided by N (official: 12)")
    radius: float | None = option(None, "radius of the ball (default, official: 0.001 H W C / N^2)")
    checkpoint: bool = option(False, "recompute each solver step in the backward pass: memory does not grow with --nfe")
    schedule: str | None = option(None, "start from this schedule.json instead of a hand-made grid")

    def __post_init__(self):
        fill_from_presets(self, PRESETS, SMOKE)
        self.n = steps_for(self.solver, self.nfe)
        self.order = self.order or min(3, ORDERS[self.solver][-1])
        require(self.order in ORDERS[self.solver], "order", self.order, f"{self.solver} offers {', '.join(map(str, ORDERS[self.solver]))}")
        self.init = self.init or ("logsnr" if self.mode == "lambda" else "uniform")
        for name in ("train_n", "valid_n", "batch_size", "valid_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.steps >= 0, "steps", self.steps, "must be 0 (evaluate only) or more")
        require(self.batch_size <= self.train_n, "batch_size", self.batch_size, f"must be at most --train-n {self.train_n}")
        require(self.radius is None or self.radius >= 0, "radius", self.radius, "must not be negative")
        if self.distance is None:
            self.distance = "lpips" if importlib.util.find_spec("lpips") else "features"
        sigma_grid(self.init, self.n, self.sigma_min, self.sigma_max)  # both raise on a range that is not one
        sigma_grid(self.teacher_grid, steps_for(self.teacher_solver, self.teacher_nfe), self.sigma_min, self.sigma_max)


# Official: configs/*.yml, trainer.py and utils.py as listed in the help of each option. eval_n 50k: the usual FID.
_OFFICIAL = dict(steps=175, theta1_steps=50, train_n=50, valid_n=50, batch_size=2, lr1=5e-3, lr2=0.1, lr_latent=12.0, eval_n=50_000,
                 eval_batch=256)
PRESETS = {
    # Small images are cheap, so more latents a step; the mean square has a far smaller gradient than LPIPS, so theta2 needs a higher rate.
    "digits": {**_OFFICIAL, "distance": "l2", "train_n": 100, "batch_size": 10, "lr2": 2.0, "eval_n": 1024},
    "mnist": {**_OFFICIAL, "distance": "l2", "lr2": 2.0, "eval_n": 10_000},
    "cifar10": _OFFICIAL,
    "imagenet64": {**_OFFICIAL, "eval_batch": 128},
    "folder": {**_OFFICIAL, "eval_n": 10_000},
}
SMOKE = dict(steps=4, theta1_steps=2, train_n=4, valid_n=2, batch_size=2, eval_n=32, eval_batch=32)


# ------------------------------------------------------------------------------------------------------------------- the method

class TimeGrid(nn.Module):
    """theta1, theta2 (n+1,) -> sigmas, sigmas_net (n+1,), decreasing from sigma_max to sigma_min.

    Levels: u = normalised cumsum(softmax(theta1)), spread over [lambda_min, lambda_max] or, in time mode and reversed, over
    [sigma_min, sigma_max]. Levels told to the network: the inner ones shifted by theta2, at most half the smallest gap.
    """

    def __init__(self, n, sigma_min=0.002, sigma_max=80.0, mode="lambda", window_rate=0.5):
        super().__init__()
        self.mode, self.window_rate = mode, window_rate
        self.register_buffer("ends", torch.tensor([sigma_max, sigma_min], dtype=torch.float64))
        self.theta1 = nn.Parameter(torch.ones(n + 1, dtype=torch.float64))
        self.theta2 = nn.Parameter(torch.zeros(n + 1, dtype=torch.float64))

    def window(self, levels):
        """The most that a level told to the network may differ from the level of the walk (no gradient)."""
        return self.window_rate * levels.detach().diff().abs().min()

    def forward(self):
        q = self.theta1.softmax(0).cumsum(0)  # (n+1,), increasing
        u = (q - q[0]) / (q[-1] - q[0])  # 0 ... 1
        if self.mode == "lambda":
            low, high = -self.ends.log()
            levels = low + (high - low) * u  # lambda, increasing
        else:
            high, low = self.ends
            levels = low + (high - low) * u.flip(0)  # sigma, decreasing
        w = self.window(levels)
        inner = torch.ones_like(levels)
        inner[0] = inner[-1] = 0
        told = levels + self.theta2.clamp(-w, w) * inner
        return ((-levels).exp(), (-told).exp()) if self.mode == "lambda" else (levels, told)

    @torch.no_grad()
    def set_to(self, sigmas, sigmas_net):
        """Take over a given grid: theta1 = log of its gaps (the softmax's inverse up to a constant), theta2 = the shifts."""
        levels, told = (-sigmas.log(), -sigmas_net.log()) if self.mode == "lambda" else (sigmas, sigmas_net)
        logits = levels.diff().abs().log()
        self.theta1[1:] = (logits if self.mode == "lambda" else logits.flip(0)) - logits.mean() + 1  # theta1[0] cancels in u
        self.theta2.copy_(told - levels)


def distillation_loss(solver, denoiser, x, target, sigmas, sigmas_net, distance):
    """d(Psi_xi(x), target) for each sample, (B,). x (B, C, H, W) is already scaled by sigmas[0]; target: the teacher's samples."""
    return distance(solver(denoiser, x, sigmas, sigmas_net=sigmas_net), target)


def project(moved, origin, radius):
    """The point of the ball |x - origin| <= radius (2-norm of a whole image, at unit variance) nearest to `moved`."""
    offset = moved - origin
    norm = offset.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return origin + offset * (radius / norm).clamp_max(1)


def make_distance(config, device):
    """d(x, y) -> (B,) for images (B, C, H, W) in [-1, 1]: mean square, mean absolute, or perceptual (normalised activations)."""
    if config.distance == "l2":
        return lambda x, y: (x - y).square().flatten(1).mean(1)
    if config.distance == "l1":
        return lambda x, y: (x - y).abs().flatten(1).mean(1)
    if config.distance == "lpips":
        if not importlib.util.find_spec("lpips"):
            raise UsageError("--distance lpips: the package is not installed; `pip install lpips`, or choose l2, l1 or features")
        import lpips
        try:
            vgg = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
        except OSError as error:
            raise UsageError(f"--distance lpips: could not download torchvision's VGG16 ({error}); put vgg16-397923af.pth into "
                             f"{torch.hub.get_dir()}/checkpoints, or choose l2, l1 or features") from None
        rgb = lambda x: x.float().expand(-1, 3, -1, -1)
        return lambda x, y: vgg(rgb(x), rgb(y)).flatten()
    classifier = load_classifier(config.dataset, device, data_dir=config.data_dir, steps=5 if config.smoke else None)

    def features(x, y):
        """As LPIPS without its learned weights: activations of every stage, normalised over channels, compared pixel by pixel."""
        maps = ([nn.functional.normalize(a, dim=1) for a in classifier.feature_maps(z.float())] for z in (x, y))
        return sum((a - b).square().sum(1).flatten(1).mean(1) for a, b in zip(*maps))

    return features


class Progress:
    """What a resumed run needs beyond the parameters: moved latents, the best grid so far, and the plateau rule's counters."""

    def __init__(self, latents, config):
        self.latents, self.best, self.best_theta, self.bad, self.floor_hits = latents.clone(), float("inf"), None, 0, 0
        self.lr_latent, self.kept = config.lr_latent / config.n, 0

    def keep_best(self, grid, value):
        if value < self.best:
            self.best, self.best_theta, self.bad = value, (grid.theta1.tolist(), grid.theta2.tolist()), 0
        else:
            self.bad += 1

    @torch.no_grad()
    def load_best(self, grid):
        for theta, best in zip((grid.theta1, grid.theta2), self.best_theta):
            theta.copy_(torch.tensor(best, dtype=torch.float64))

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        state["latents"] = state["latents"].to(self.latents.device)
        vars(self).update(state)


def make_solver(name, order, variant="bh1"):
    return partial(SOLVERS[name], order=order, **({"variant": variant} if name == "unipc" else {}))


def teacher_samples(config, teacher, noise, labels=None):
    """Psi_teacher: unit noise (B, C, H, W) -> the accurate solution of the same ODE."""
    n = steps_for(config.teacher_solver, config.teacher_nfe)
    sigmas = sigma_grid(config.teacher_grid, n, config.sigma_min, config.sigma_max)
    solver = make_solver(config.teacher_solver, min(3, ORDERS[config.teacher_solver][-1]))
    with torch.no_grad():
        return solver(with_labels(teacher, labels), config.sigma_max * noise, sigmas)


def train(config, run=None, teacher=None, distance=None):
    """Learn the grid; return (sigmas, sigmas_net), each (n+1,) float64. With config.steps = 0: where it would start from."""
    run = run or Run("ld3", config)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    start = read_schedule(config) if config.schedule else 2 * (sigma_grid(config.init, config.n, config.sigma_min, config.sigma_max),)
    if config.steps == 0:
        return start
    grid = TimeGrid(config.n, config.sigma_min, config.sigma_max, config.mode)
    grid.set_to(start[0], start[1] if config.times == "decoupled" else start[0])
    shape = teacher.net.img_shape
    solver, distance = make_solver(config.solver, config.order, config.variant), distance or make_distance(config, run.device)
    radius = 0.001 * shape[0] * shape[1] * shape[2] / config.n**2 if config.radius is None else config.radius
    run.say(f"{config.solver} of order {config.order}, {config.nfe} evaluations, distance {config.distance}, "
            f"{config.objective} objective (radius {radius:.3g}), {config.times} times, start {config.schedule or config.init}")

    # Noise from seeds that the evaluation (0, 1, 2, ...) does not use, and the teacher's samples from that noise.
    seeds = torch.arange(config.train_n + config.valid_n) + 10**6 * (config.seed + 1)
    origin = noise_from_seeds(seeds, shape, run.device)  # (train_n + valid_n, C, H, W), unit variance
    labels = labels_for(seeds, teacher.net.label_dim, run.device)
    mine = torch.arange(len(seeds))[share_of(len(seeds))].split(config.eval_batch)  # under torchrun every rank makes its share
    target = gather_rows(torch.cat([origin[:0], *(teacher_samples(config, teacher, origin[i], None if labels is None else labels[i])
                                                  for i in mine if len(i))]))

    def loss_of(latents, indices):
        denoiser = with_labels(teacher, None if labels is None else labels[indices])
        if config.checkpoint and torch.is_grad_enabled():
            denoiser = partial(checkpoint, denoiser, use_reentrant=False)
        return distillation_loss(solver, denoiser, config.sigma_max * latents, target[indices], *grid(), distance)  # (B,)

    def validate():
        with torch.no_grad():
            mine = torch.arange(config.train_n, len(seeds))[share_of(config.valid_n)].split(config.eval_batch)
            total = sum((loss_of(origin[i], i).double().sum() for i in mine if len(i)), torch.zeros((), device=run.device).double())
            return sum_over_ranks(total).item() / config.valid_n

    optimizer1 = torch.optim.RMSprop([grid.theta1], config.lr1, momentum=0.9)
    optimizer2 = torch.optim.SGD([grid.theta2], config.lr2 / config.n)
    progress = Progress(origin[: config.train_n], config)
    parts = {"grid": grid, "optimizer1": optimizer1, "optimizer2": optimizer2, "progress": progress}
    first = run.restore(parts)
    if first == 0:
        progress.keep_best(grid, validate())
    batches = config.train_n // config.batch_size  # per round
    for step in run.steps(first, config.steps, parts, "learning the grid"):
        order = torch.randperm(config.train_n, generator=torch.Generator().manual_seed(config.seed * 10**6 + step // batches))
        batch = order[step % batches * config.batch_size:][: config.batch_size]
        mine = share_of(len(batch))  # under torchrun; a rank that is left without works on the first latent, for nothing
        rows, own = len(batch[mine]), batch[mine] if len(batch[mine]) else batch[:1]
        latents = progress.latents[own].requires_grad_(config.objective == "soft")
        loss = loss_of(latents, own)  # (B,)
        run.loss = loss.mean() * (rows * run.world / len(batch))  # the mean over the ranks is that over the batch
        optimizer1.zero_grad()
        optimizer2.zero_grad()
        run.loss.backward()
        average_gradients(grid.parameters())
        nn.utils.clip_grad_norm_(grid.parameters(), 1.0)
        optimizer1.step()
        if step >= config.theta1_steps and config.times == "decoupled":
            optimizer2.step()

        if config.objective == "soft":  # a move is kept only where it lowered the loss, the new grid included
            with torch.no_grad():
                moved = project(latents - progress.lr_latent * latents.grad / run.world, origin[own], radius)
                better = (loss_of(moved, own) < loss).view(-1, 1, 1, 1)
                kept = torch.zeros_like(origin[batch])  # of all ranks together
                kept[mine] = torch.where(better, moved, latents)[:rows]
                progress.latents[batch] = sum_over_ranks(kept)
                progress.kept += int(sum_over_ranks(better[:rows].sum()))
            if (step + 1) % batches == 0:
                progress.lr_latent, progress.kept = progress.lr_latent / (1 if progress.kept else 2), 0

        if (step + 1) % config.valid_every == 0 or step + 1 == config.steps:
            value = validate()
            run.log(step=step, what="validation", loss=value)
            progress.keep_best(grid, value)
            if progress.bad == 5:  # a plateau: back to the best grid, slower
                progress.bad = 0
                progress.load_best(grid)
                progress.floor_hits += optimizer2.param_groups[0]["lr"] <= 1e-6
                for (group,), floor in ((optimizer1.param_groups, 5e-5), (optimizer2.param_groups, 1e-6)):
                    group["lr"] = min(group["lr"], max(0.8 * group["lr"], floor))
            if progress.floor_hits == 5:
                break
    progress.load_best(grid)
    with torch.no_grad():
        return grid()


# ------------------------------------------------------------------------------------------------------ schedules and measurement

def write_schedule(path, config, sigmas, sigmas_net):
    """schedule.json. `sigmas`, all n+1 of them, is also what diffusers' `sigmas=` argument takes; diffusers cannot decouple times."""
    save_json(path, {"method": "ld3", "solver": config.solver, "order": config.order, "variant": config.variant, "nfe": config.nfe,
                     "dataset": config.dataset, "teacher": config.teacher or config.dataset, "sigmas": sigmas.tolist(),
                     "sigmas_net": sigmas_net.tolist()})


def read_schedule(config):
    """(sigmas, sigmas_net) from a schedule.json; UsageError if the file is none, or does not fit --nfe or the range of levels."""
    path = Path(config.schedule)
    try:
        schedule = json.loads(path.read_text())
        sigmas, sigmas_net = (torch.tensor(schedule[k], dtype=torch.float64) for k in ("sigmas", "sigmas_net"))
        learned_for = f"{schedule['solver']} of order {schedule['order']} with {schedule['nfe']} evaluations"
    except OSError as error:
        raise UsageError(f"--schedule {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UsageError(f"--schedule {path}: not a schedule.json of ld3.py ({type(error).__name__}: {error})") from None
    check_grid(sigmas, f"--schedule {path}")
    require(len(sigmas) == len(sigmas_net) == config.n + 1, "schedule", path,
            f"has {len(sigmas)} levels for {learned_for}; --solver {config.solver} --nfe {config.nfe} needs {config.n + 1}")
    ends = torch.tensor([config.sigma_max, config.sigma_min], dtype=torch.float64)
    require(torch.allclose(sigmas[[0, -1]], ends), "schedule", path,
            f"goes from sigma {sigmas[0]:g} to {sigmas[-1]:g}, but this run from {config.sigma_max:g} to {config.sigma_min:g}")
    return sigmas, sigmas_net


def evaluate(config, run, teacher, judge, sigmas, sigmas_net):
    """Teacher, hand-made grids and LD3 from the same held-out noise (seeds 0 ... eval_n - 1): rows for metrics.json, and pictures.

    rmse_to_teacher: root mean square over images and pixels in [-1, 1], against the teacher solver's samples.
    """
    shape = teacher.net.img_shape
    solver = make_solver(config.solver, config.order, config.variant)
    hand_made = ("uniform", "quadratic", "logsnr", "edm")
    grids = {kind: (sigma_grid(kind, config.n, config.sigma_min, config.sigma_max), None) for kind in hand_made}
    if config.steps or config.schedule:
        grids["ld3"] = (sigmas, sigmas_net)

    def student(noise, labels, levels, told):
        return solver(with_labels(teacher, labels), config.sigma_max * noise, levels, sigmas_net=told)

    samplers = {("teacher", config.teacher_nfe): partial(teacher_samples, config, teacher),
                **{(name, config.nfe): partial(student, levels=levels, told=told) for name, (levels, told) in grids.items()}}
    (teacher_row, *rows), pictures = measure(samplers, config, shape, run.device, judge, teacher.net.label_dim, truth=True)
    best = min(rows[:4], key=lambda row: row["rmse_to_teacher"])["name"]
    rows += [{"name": "ld3", "nfe": config.nfe}] if "ld3" not in grids else []
    if run.rank == 0:
        save_rows(run.out / "samples.png", {k: v for k, v in pictures.items() if k.split()[0] in ("teacher", best, "ld3")})
        title = f"{config.dataset}, {config.solver} of order {config.order}, {config.nfe} evaluations"
        save_sigma_grids(run.out / "grids.png", grids, title)
    return [*rows, teacher_row]


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("ld3", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    distance = make_distance(config, run.device) if config.steps else None  # before the judge, which may have long work to do
    judge = make_judge(config, run.device)
    sigmas, sigmas_net = train(config, run, teacher, distance)  # under torchrun: the same on every rank
    if config.steps and run.rank == 0:
        write_schedule(run.out / "schedule.json", config, sigmas, sigmas_net)
    results = evaluate(config, run, teacher, judge, sigmas, sigmas_net)
    run.metrics(results, teacher=config.teacher or f"{config.dataset} (shipped or cached)")
    run.say(table(results, ["name", "nfe", "rmse_to_teacher", *SCORES]))
    run.say(f"{run.seconds():.0f} s; results in {run.out}: metrics.json, samples.png, grids.png" + ", schedule.json" * bool(config.steps))


if __name__ == "__main__":
    cli(main)
