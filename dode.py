"""D-ODE: Distilling ODE Solvers of Diffusion Models into Smaller Steps
(Kim, Tang & Yu, CVPR 2024, arXiv:2309.16421).

Idea: consecutive outputs of the network differ along a direction that shows how the
sampling trajectory bends. A D-ODE solver replaces the output D_i by O_i = D_i + lambda_i
(D_i - D_{i-1}) and takes the same step as before. One lambda per network evaluation is fitted
by least squares to a teacher solver with C times the steps: no training, no gradients.

Loss, minimised in closed form at each evaluation, from the corrected state before it:
    lambda_i = argmin |X_i - x_i - lambda delta_i|^2 = <delta_i, X_i - x_i> / <delta_i, delta_i>
x_i: the plain solver's state; delta_i: what lambda = 1 adds to it; X_i: the teacher's state
at the same noise level. <,>: over all pixels of all images of the fitting set.

Differences from the paper and its code (D-ODE-Solvers, commit 6dc5a1c):
1. The teacher's levels contain the student's. Theirs: EDM's teacher has its own C N - 1
   intervals, compared by count (N = C = 10: 45.0 for 42.4, ..., 0.0141 for 0.002); VP targets
   are 90 of 1000 timesteps too noisy.
2. N steps to sigma_min (theirs: N - 1 to sigma_min = 0.002, and one to 0).
3. Fitted on any number of images, over all ranks, none of them evaluated (theirs: each
   rank's first batch of 100, which counts among the 50,000 of the FID).
4. lambda is inside the step: 1/2 in noise is two-step Adams-Bashforth (row ab2). Theirs is
   outside: ours times the output's weight in the move; in DPM-Solver as here.
5. D is the data (theirs: the noise where the network predicts it; here --output eps).
6. DPM-Solver-2's inner level: the middle in log sigma (theirs: in VP time). DEIS integrates
   exactly (theirs: a Riemann sum). With odd --nfe, heun and dpm2 end with an Euler step.
Result on digits, 4 NFE, RMSE to a fine trajectory: ddim .292 -> .222. More: RESULTS.md
    python dode.py                         # digits: 30 s
    python dode.py --lambdas lambdas.json  # measure those of an earlier run
"""
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from common.diffusion import GRIDS, noise_from_seeds, sigma_grid, with_labels
from common.fid import labels_for, make_evaluator, measure
from common.machinery.files import read_json, save_json
from common.machinery.options import SolverOptions, cli, complete, option, parse_config, require
from common.machinery.plots import save_curves, save_rows
from common.machinery.ranks import share_of, sum_over_ranks
from common.machinery.run import Run, State
from common.machinery.schedule import coupled_schedule
from common.solvers import TWO_EVALUATIONS, deis, dpm2, dpmpp, euler, heun, ipndm
from common.teacher import load_teacher

SOLVERS = {
    "ddim": euler, "ipndm": ipndm, "dpm2": dpm2,
    "deis2": partial(deis, order=2), "deis3": partial(deis, order=3), "heun": heun,
}


# --- a solver, one evaluation at a time

class Stage(NamedTuple):
    """One evaluation and the move after it: x <- start + sum_j weights[j] slope_j.

    slope = dx/dsigma = (x - D(x, sigma)) / sigma, the newest first.
    """
    sigma: float  # noise level of the evaluation
    to: float  # noise level after the move
    second: bool  # of a Runge-Kutta step: start is where that began, else x
    weights: tuple  # one to four floats


def stages_of(solver, sigmas, nfe=None):
    """A solver on the grid `sigmas` (n+1,) as a list of `nfe` Stages.

    All solvers are linear in the slopes: with unit vectors as slopes, states are weights.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    unit = torch.eye(2 * len(sigmas), dtype=torch.float64)
    levels, states, stages = [], [], []

    def denoiser(x, sigma):
        levels.append(float(sigma))
        states.append(x)
        return x - sigma * unit[len(levels) - 1]  # its slope is a unit vector

    states.append(SOLVERS[solver](denoiser, 0 * unit[:1], sigmas))
    levels.append(float(sigmas[-1]))
    for k in range(len(levels) - 1):
        second = solver in TWO_EVALUATIONS and k % 2 == 1
        move = states[k + 1] - states[k - 1 if second else k]
        weights = move[0, : k + 1].flip(0).tolist()
        while not weights[-1]:
            weights.pop()
        stages.append(Stage(levels[k], levels[k + 1], second, tuple(weights)))
    if nfe == len(stages) - 1:  # an odd budget: the last step becomes Euler's
        sigma, to = sigmas[-2:].tolist()
        stages[-2:] = [Stage(sigma, to, False, (to - sigma,))]
    return stages


class Point(NamedTuple):
    """A point of a sampling trajectory: tensors (B, C, H, W), float64."""
    x: torch.Tensor
    start: torch.Tensor  # where the step began
    output: torch.Tensor | None  # D_{i-1}
    delta: torch.Tensor | None = None  # what lambda = 1 adds to x
    slopes: tuple = ()  # the newest first, at most 4


def begin(x, sigma, output="x0"):
    """The first point. In data it has no D_{i-1}; in noise that is x_T, at unit variance."""
    return Point(x, x, None if output == "x0" else x / (1 + sigma**2) ** 0.5)


def step(denoiser, point, stage, output="x0"):
    """One evaluation: the next Point, not corrected.

    D_i is the network's output; in a multistep solver, the combination it moves along.
    """
    x, h = point.x, stage.to - stage.sigma
    denoised = denoiser(x, stage.sigma)  # (B, C, H, W)
    slopes = ((x - denoised) / stage.sigma, *point.slopes[:3])
    start = point.start if stage.second else x
    moved = start + sum(w * slope for w, slope in zip(stage.weights, slopes))
    now, gain = slopes[0], stage.weights[0]  # D_i in noise, and its weight in the move
    if not stage.second:
        now, gain = sum(w / h * slope for w, slope in zip(stage.weights, slopes)), h
    if output == "x0":  # in data, D = x - sigma slope, without cancellation
        now, gain = denoised + stage.sigma * (slopes[0] - now), -gain / stage.sigma
    delta = torch.zeros_like(x) if point.output is None else gain * (now - point.output)
    return Point(moved, start, now, delta, slopes)


def integrate(denoiser, x, stages, lambdas=None, output="x0"):
    """A solver, plain or distilled, from stages[0].sigma to stages[-1].to; float64."""
    point = begin(x.double(), stages[0].sigma, output)
    for stage, value in zip(stages, lambdas or [0.0] * len(stages)):
        point = step(denoiser, point, stage, output)
        point = point._replace(x=point.x + value * point.delta)
    return point.x


# --- the fit

def student_grid(config, solver, nfe):
    """Noise levels (n+1,) for `nfe` evaluations: one a step, or two (n is rounded up)."""
    n = (nfe + 1) // 2 if solver in TWO_EVALUATIONS else nfe
    sigmas = sigma_grid(config.grid, n, config.sigma_min, config.sigma_max)
    return coupled_schedule(config.schedule, sigmas) if config.schedule else sigmas


def teacher_grid(student, scale):
    """(levels, targets): stage k is compared with the teacher at levels[targets[k]].

    C levels per evaluation: between two of the student's, EDM's, uniform in sigma^(1/7).
    """
    levels = [student[0].sigma]
    for to, count in Counter(stage.to for stage in student).items():  # Heun: two stages
        first, last = torch.tensor([levels[-1], to], dtype=torch.float64) ** (1 / 7)
        u = torch.linspace(0, 1, scale * count + 1, dtype=torch.float64)[1:-1]
        levels += [*((first + u * (last - first)) ** 7).tolist(), to]
    targets = [levels.index(stage.to) for stage in student]
    return torch.tensor(levels, dtype=torch.float64), targets


def make_plan(config, solver, nfe):
    """(student's stages, teacher's stages, targets)."""
    student = stages_of(solver, student_grid(config, solver, nfe), nfe)
    levels, targets = teacher_grid(student, config.scale)
    teacher = "ddim" if solver in TWO_EVALUATIONS else solver  # as in the paper
    return student, stages_of(teacher, levels), targets


@torch.no_grad()
def fit_lambdas(student, teacher, targets, denoiser, x, output="x0"):
    """One lambda per stage, and the sum of squares that remains after the last one.

    x (N, C, H, W): this rank's images at the first level. Sums are over all ranks.
    """
    ours, theirs = begin(x, student[0].sigma, output), begin(x, student[0].sigma)
    lambdas, done = [], 0
    for stage, target in zip(student, targets):
        for teacher_stage in teacher[done:target]:
            theirs = step(denoiser, theirs, teacher_stage)
        done = target
        ours = step(denoiser, ours, stage, output)
        delta, rest = ours.delta, theirs.x - ours.x  # delta_i, X_i - x_i
        length = inner(delta, delta)  # 0 where there is no D_{i-1}
        lambdas.append(inner(delta, rest) / length if length else 0.0)
        ours = ours._replace(x=ours.x + lambdas[-1] * delta)
    rest = theirs.x - ours.x
    return lambdas, inner(rest, rest)


def inner(a, b):
    """The inner product over the images of all ranks."""
    return sum_over_ranks((a * b).sum()).item()


@dataclass
class Config(SolverOptions):
    nfe: tuple[int, ...] = option((5,), "network evaluations (official: 10)", low=1)
    solver: tuple[str, ...] = option(tuple(SOLVERS), "solvers to distil", choices=tuple(SOLVERS))
    scale: int = option(10, "C: teacher steps per evaluation (official: 10)", low=1)
    grid: str = option("edm", "the student's time grid (official: edm)", choices=GRIDS)
    output: str = option("x0", "D: data (official: EDM) or noise (DDPM)", choices=("x0", "eps"))
    schedule: str | None = option(None, "grid: schedule.json of ld3.py --times coupled")
    lambdas: str | None = option(None, "lambdas.json of an earlier run: fit nothing")
    fit_n: int | None = option(None, "images of the fitting set", low=1)
    fit_batch: int | None = option(None, "of these, how many at a time", low=1)
    reference_nfe: int | None = option(None, "of RMSE's fine trajectory, by Heun", low=2)

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        for job in product(("ddim", *self.solver), self.nfe):
            student_grid(self, *job)  # may raise


# Official: launch.sh (one batch of 100), the usual FID of 50,000 images.
_OFFICIAL = dict(fit_n=100, fit_batch=100, reference_nfe=200, eval_n=50_000, eval_batch=256)
PRESETS = {
    "digits": dict(fit_n=256, fit_batch=128, reference_nfe=64, eval_n=512, eval_batch=128),
    "mnist": dict(fit_n=128, fit_batch=32, reference_nfe=50, eval_n=512, eval_batch=32),
    "cifar10": _OFFICIAL,
    "imagenet64": {**_OFFICIAL, "eval_batch": 128},
    "folder": dict(fit_n=128, fit_batch=32, reference_nfe=50, eval_n=500, eval_batch=50),
    "folder-gpu": {**_OFFICIAL, "eval_n": 10_000},
}
SMOKE = dict(fit_n=8, fit_batch=4, reference_nfe=8, eval_n=32, eval_batch=32)


def fit(config, run=None, teacher=None):
    """Fit every solver at every --nfe; {(solver, nfe): its entry in lambdas.json}."""
    run = run or Run("dode", config)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    require(config.fit_n >= run.world, "fit_n", config.fit_n, f"there are {run.world} ranks")
    seeds = torch.arange(config.fit_n) + 10**9 * (config.seed + 1)  # evaluation: 0, 1, ...
    seeds = seeds[share_of(config.fit_n)]
    x = config.sigma_max * noise_from_seeds(seeds, teacher.net.img_shape, run.device)
    if x.is_cuda and 16 * x.nbytes > torch.cuda.mem_get_info()[0] / 4:  # two Points
        x = x.cpu()

    def denoiser(x, sigma):  # the teacher, --fit-batch images at a time
        outputs = []
        for part, seed in zip(x.split(config.fit_batch), seeds.split(config.fit_batch)):
            labels = labels_for(seed, teacher.net.label_dim, run.device)
            outputs.append(teacher(part.to(run.device), sigma, labels))
        return torch.cat(outputs).to(x.device)

    state = State(fitted={})
    run.resume(state=state)
    jobs = list(product(config.nfe, config.solver))
    for job in run.steps(len(jobs), "fitting"):
        (nfe, solver), started = jobs[job], time.perf_counter()
        student, fine, targets = make_plan(config, solver, nfe)
        lambdas, squares = fit_lambdas(student, fine, targets, denoiser, x, config.output)
        mean = squares / (config.fit_n * x[0].numel())
        run.loss = torch.tensor(mean**0.5)  # RMSE to the teacher's last state
        state.fitted[solver, nfe] = {
            "solver": solver, "nfe": nfe, "sigmas": student_grid(config, solver, nfe).tolist(),
            "lambdas": lambdas, "fit_evaluations": config.fit_n * (nfe + len(fine)),
            "fit_seconds": round(time.perf_counter() - started, 2),
        }
    return state.fitted


def read_lambdas(config):
    """What `fit` returned, from --lambdas. UsageError if its options were others."""
    def about(output, sigmas, count):
        grid = ", ".join(f"{sigma:.6g}" for sigma in sigmas)
        return f"--output {output}, {count} finite lambdas, grid {grid}"

    has, what = {}, "a lambdas.json of dode.py"
    file = read_json(config.lambdas, "lambdas", what)
    try:
        entries = {f"{e['solver']} at {e['nfe']}": e for e in file["solvers"]}
        for job, entry in entries.items():
            count = sum(map(math.isfinite, entry["lambdas"]))
            has[job] = about(file["output"], entry["sigmas"], count)
    except Exception as error:  # whatever the file holds
        why = f"not {what} ({type(error).__name__}: {error})"
        require(False, "lambdas", config.lambdas, why)
    chosen = {}
    for nfe, solver in product(config.nfe, config.solver):
        sigmas, job = student_grid(config, solver, nfe), f"{solver} at {nfe}"
        needs = about(config.output, sigmas, nfe)
        wrong = f"has {has.get(job, list(has))}; --solver {solver} --nfe {nfe} needs {needs}"
        require(has.get(job) == needs, "lambdas", config.lambdas, wrong)
        chosen[solver, nfe] = entries[job]
    return chosen


def main():
    config = parse_config(Config, PRESETS, __doc__)
    fitted = read_lambdas(config) if config.lambdas else None  # before any work
    run = Run("dode", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    evaluator = make_evaluator(config, run.device)
    fitted = fitted or fit(config, run, teacher)
    if run.rank == 0 and not config.lambdas:
        save_json(run.out / "lambdas.json", {**vars(config), "solvers": list(fitted.values())})

    def sampler(solver, *arguments, **options):
        return lambda noise, labels: solver(
            with_labels(teacher, labels), config.sigma_max * noise, *arguments, **options
        )

    samplers, curves = {}, {}
    for (solver, nfe), entry in fitted.items():
        stages, lambdas = stages_of(solver, entry["sigmas"], nfe), entry["lambdas"]
        samplers[solver, nfe] = sampler(integrate, stages)
        samplers[f"d-{solver}", nfe] = sampler(integrate, stages, lambdas, config.output)
        curves.setdefault(f"d-{solver}", (range(1, nfe + 1), lambdas))  # the first --nfe
    for nfe in config.nfe:
        sigmas = student_grid(config, "ddim", nfe)
        samplers["ab2", nfe] = sampler(ipndm, sigmas, order=2)
        samplers["dpmpp2m", nfe] = sampler(dpmpp, sigmas, order=2)
    n = config.reference_nfe // 2
    sigmas = sigma_grid("edm", n, config.sigma_min, config.sigma_max)
    samplers["teacher", 2 * n] = sampler(heun, sigmas)

    rows, pictures = measure(run, samplers, teacher.net, evaluator, reference="teacher")
    for row, entry in zip(rows[1::2], fitted.values()):  # of d-ddim, d-ipndm, ...
        row |= {name: value for name, value in entry.items() if name.startswith("fit_")}
    save_rows(run.out / "samples.png", pictures)
    names = f"network evaluation, 1 to {config.nfe[0]}", "lambda (logarithmic beyond 1)"
    save_curves(run.out / "lambdas.png", curves, *names, log="symlog")
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
