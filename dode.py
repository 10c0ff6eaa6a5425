"""D-ODE: Distilling ODE Solvers of Diffusion Models into Smaller Steps
(Kim, Tang & Yu, CVPR 2024, arXiv:2309.16421).

Idea: two consecutive outputs of the network differ along a direction that shows how the
sampling trajectory bends. A D-ODE solver puts O_i = D_i + lambda_i (D_i - D_{i-1}) in
place of output D_i and takes the same step. One scalar lambda_i per network evaluation is
fitted by least squares to a finer solver: no training, no gradients. `d_ddim` is the whole
method for DDIM; the rest of the file is the same for any solver.

Three things are called a teacher in the paper. Here they are the *teacher network*; the
*fine solver*, with C times the evaluations, to which lambda is fitted; and the *reference*,
Heun's method on a fine grid, to which RMSE is measured (the row "teacher").

Loss, minimised in closed form at each evaluation i, from the corrected state before it:
  lambda_i = argmin |X_i - x_i - lambda delta_i|^2 = <delta_i, X_i - x_i> / <delta_i, delta_i>
x_i: the plain solver's state after the step; X_i: the fine solver's, at the same level of
noise; delta_i: what lambda = 1 adds to x_i; <,>: the sum over all pixels of all images. Both
solvers start from the same images of pure noise, --fit-n of them, which are all that is drawn
(edm/distilled_sampler.py:4-13, 60-79; dpm_solver/functions/denoising.py:21-30, 191-197).

Differences from the paper and its code (D-ODE-Solvers, commit 6dc5a1c):
1. The fine solver passes through the student's noise levels. Theirs: the student's state k
   is fitted to the fine state kC, at another level. On EDM's grid with N = C = 10 the fine
   state has sigma 45.0 where the student's has 42.4, at the end 0.0141 where it has 0.002.
   In VP time DDIM's fine states are 90 of 1000 timesteps noisier, except the last, and
   DPM-Solver-2's about 10 less noisy; those of iPNDM and DEIS are at the same level.
2. N steps to sigma_min. Theirs: N - 1 to sigma_min, one to 0 (EDM), or N to t = 0 (VP).
3. Any number of fitting images, over all ranks, none of them evaluated. Theirs: each rank's
   first batch of 100, with lambdas of its own, counted among the 50,000 of the FID.
4. lambda multiplies D_i - D_{i-1} before it enters the step: with noise as D, lambda = 1/2
   is two-step Adams-Bashforth (row ab2). Theirs, except DPM-Solver's, is added after the
   step, so that it is ours times the weight that D_i has in the step.
5. D is the x0-prediction (theirs with EDM's networks); --output eps: noise (DDPM's).
6. DPM-Solver-2's inner level: the middle in log sigma (theirs: in VP time). DEIS integrates
   exactly (theirs: a Riemann sum). Fine solvers of any length (theirs: at most 1000 steps).
7. --grid auto on small data: the grid on which the plain solver ends nearest to the
   reference. Theirs: edm for DDIM and Heun with EDM's networks, and for DDPM's vp (uniform
   VP time) for DDIM, iPNDM, DPM-Solver and DEIS.
8. CIFAR-10: EDM's unconditional network (theirs: --teacher edm-cifar10-32x32-cond-vp).
Result on digits, 5 evaluations, cosine grid: RMSE .165 -> .109, FID* 1.55 -> .53 (DDIM);
with nothing fitted, two-step Adams-Bashforth .123, .64, UniPC-3 .097, .49. RESULTS.md.
    python dode.py                         # digits: a minute
    python dode.py --lambdas lambdas.json  # measure those of an earlier run
"""
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import torch

from common.baselines import untrained_sampler
from common.diffusion import GRIDS, noise_from_seeds, sigma_grid, with_labels
from common.fid import labels_for, make_evaluator, measure
from common.machinery.files import save_json
from common.machinery.options import SolverOptions, cli, complete, option, parse_config, require
from common.machinery.plots import save_curves, save_rows
from common.machinery.ranks import share_of, sum_over_ranks
from common.machinery.run import Run, State
from common.machinery.schedule import coupled_schedule, read_lambdas
from common.solvers import TWO_EVALUATIONS, deis, dpm2, dpmpp, euler, heun, ipndm
from common.teacher import load_teacher

SOLVERS = {
    "ddim": euler, "ipndm": ipndm, "dpm2": dpm2,
    "deis2": partial(deis, order=2), "deis3": partial(deis, order=3), "heun": heun,
}


# --- the method, for DDIM

def d_ddim(denoiser, x, sigmas, scale=10, lambdas=None):
    """D-DDIM from x at sigmas[0] to sigmas[-1]: the last state, and the lambdas.

    It is fitted to DDIM with `scale` times the steps; with `lambdas` it only samples. The
    functions below do the same (a test compares them), for any solver.
    """
    fine, fitted, d_before = x, [], None
    for i, (sigma, to) in enumerate(pairwise(sigmas)):
        d_i = denoiser(x, sigma)
        x = x + (to - sigma) * (x - d_i) / sigma  # x_i: one step of DDIM
        delta = (1 - to / sigma) * (d_i - d_before) if i else torch.zeros_like(x)
        if lambdas:
            lam = lambdas[i]
        else:
            for s, s_to in pairwise(levels_between(sigma, to, scale)):
                fine = fine + (s_to - s) * (fine - denoiser(fine, s)) / s  # X_i: `scale` steps
            lam = (delta * (fine - x)).sum() / (delta * delta).sum() if i else 0.0
        x = x + lam * delta
        fitted.append(float(lam))
        d_before = d_i
    return x, fitted


def levels_between(sigma, to, count):
    """`count` steps from sigma down to `to`: count + 1 noise levels, even in sigma^(1/7)."""
    first, last = sigma ** (1 / 7), to ** (1 / 7)
    inner = [(first + k / count * (last - first)) ** 7 for k in range(1, count)]
    return [sigma, *inner, to]


# --- any solver, one network evaluation at a time

class Stage(NamedTuple):
    """One evaluation and the step after it: x <- start + sum_j weights[j] slope_j.

    slope = dx/dsigma = (x - D(x, sigma)) / sigma, the newest first. `start` is x, or in the
    second stage of a Runge-Kutta step the state where that step began. iPNDM's second
    evaluation on the grid 80, 10, 1, 0.1, where it is two-step Adams-Bashforth:
        Stage(sigma=10.0, to=1.0, second=False, weights=(-13.5, 4.5))
    """
    sigma: float  # noise level of the evaluation
    to: float  # noise level after it
    second: bool  # the second stage of a Runge-Kutta step
    weights: tuple  # one to four floats


def stages_of(solver, sigmas, nfe=None):
    """A solver on the grid `sigmas` (n+1,) as a list of `nfe` Stages.

    The solver runs from x = 0 on a fake denoiser whose k-th slope is the k-th unit vector:
    solvers are linear in the slopes, so that each state *is* the list of its weights.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    unit = torch.eye(2 * len(sigmas), dtype=torch.float64)
    levels, states, stages = [], [], []

    def fake_denoiser(x, sigma):
        levels.append(float(sigma))
        states.append(x)
        return x - sigma * unit[len(levels) - 1]  # (x - D) / sigma is a unit vector

    states.append(SOLVERS[solver](fake_denoiser, 0 * unit[:1], sigmas))
    levels.append(float(sigmas[-1]))
    for k in range(len(levels) - 1):
        second = solver in TWO_EVALUATIONS and k % 2 == 1
        change = states[k + 1] - states[k - 1 if second else k]
        weights = change[0, : k + 1].flip(0).tolist()
        while not weights[-1]:
            weights.pop()
        stages.append(Stage(levels[k], levels[k + 1], second, tuple(weights)))
    if nfe == len(stages) - 1:  # an odd number: the last step becomes Euler's
        sigma, _, to = levels[-3:]
        stages[-2:] = [Stage(sigma, to, False, (to - sigma,))]
    return stages


class Point(NamedTuple):
    """A point of a sampling trajectory: tensors (B, C, H, W), float64."""
    x: torch.Tensor
    start: torch.Tensor  # the state where the solver's step began
    output: torch.Tensor | None  # D of the evaluation before; None: there is none
    delta: torch.Tensor | None = None  # what lambda = 1 adds to x
    slopes: tuple = ()  # of the evaluations before, the newest first, at most 4


def begin(x, sigma, output="x0"):
    """The first point of a trajectory, D_{-1} as in the official code.

    An x0-prediction has none: the first evaluation is not corrected. For an eps-prediction it
    is x_T, at unit variance.
    """
    return Point(x, x, None if output == "x0" else x / (1 + sigma**2) ** 0.5)


def step(denoiser, point, stage, output="x0"):
    """One evaluation and the plain solver's step: the next Point, not corrected."""
    x = point.x
    denoised = denoiser(x, stage.sigma)  # (B, C, H, W)
    slopes = ((x - denoised) / stage.sigma, *point.slopes[:3])
    start = point.start if stage.second else x
    change = sum(w * slope for w, slope in zip(stage.weights, slopes))
    # With noise as D, D_i is the weighted mean of slopes along which the solver makes its step
    # (in a second stage: the newest slope), and `gain` is its weight in the step.
    gain = stage.weights[0] if stage.second else stage.to - stage.sigma
    d_i = eps_i = slopes[0] if stage.second else change / gain
    if output == "x0":
        # D_i = x - sigma eps_i, written so that nothing cancels. The step contains
        # gain * eps_i = gain * (x - D_i) / sigma: the weight of D_i is -gain / sigma.
        d_i, gain = denoised + stage.sigma * (slopes[0] - eps_i), -gain / stage.sigma
    delta = torch.zeros_like(x) if point.output is None else gain * (d_i - point.output)
    return Point(start + change, start, d_i, delta, slopes)


def integrate(denoiser, x, stages, lambdas=None, output="x0"):
    """A solver, plain or distilled, from stages[0].sigma to stages[-1].to; float64."""
    point = begin(x.double(), stages[0].sigma, output)
    for stage, lam in zip(stages, lambdas or [0.0] * len(stages)):
        point = step(denoiser, point, stage, output)
        point = point._replace(x=point.x + lam * point.delta)
    return point.x


# --- the fit

def student_grid(config, solver, nfe, kind=None):
    """Noise levels (n+1,) for `nfe` evaluations: one a step, or two (n is rounded up).

    Of a hand-made grid (--grid, or `kind` where that is auto), or of --schedule.
    """
    n = (nfe + 1) // 2 if solver in TWO_EVALUATIONS else nfe
    kind = (kind or "edm") if config.grid == "auto" else config.grid
    sigmas = sigma_grid(kind, n, config.sigma_min, config.sigma_max)
    return coupled_schedule(config.schedule, sigmas) if config.schedule else sigmas


def fine_grid(student, scale):
    """(levels, targets): stage k is compared with the fine state at levels[targets[k]].

    Between two of the student's levels `scale` fine steps per evaluation: twice as many for
    Heun's two stages, which end at the same level.
    """
    levels = [student[0].sigma]
    for to in dict.fromkeys(stage.to for stage in student):
        count = sum(stage.to == to for stage in student)
        levels += levels_between(levels[-1], to, scale * count)[1:]
    targets = [levels.index(stage.to) for stage in student]
    return torch.tensor(levels, dtype=torch.float64), targets


def make_plan(config, solver, nfe, kind=None):
    """(student's stages, fine solver's stages, targets)."""
    student = stages_of(solver, student_grid(config, solver, nfe, kind), nfe)
    levels, targets = fine_grid(student, config.scale)
    fine_solver = "ddim" if solver in TWO_EVALUATIONS else solver  # as in the paper
    return student, stages_of(fine_solver, levels), targets


def fit_lambdas(student, fine, targets, denoiser, x, output="x0"):
    """One lambda per stage, and the sum of squares that remains after the last one.

    x (N, C, H, W): this rank's images at the first level. Sums are over all ranks.
    """
    student_point, fine_point = begin(x, student[0].sigma, output), begin(x, student[0].sigma)
    lambdas, done = [], 0
    for stage, target in zip(student, targets):
        for fine_stage in fine[done:target]:
            fine_point = step(denoiser, fine_point, fine_stage)
        done = target
        student_point = step(denoiser, student_point, stage, output)
        delta = student_point.delta  # delta_i
        error = fine_point.x - student_point.x  # X_i - x_i
        length = inner(delta, delta)  # 0 where there is no D_{i-1}
        lambdas.append(inner(delta, error) / length if length else 0.0)
        student_point = student_point._replace(x=student_point.x + lambdas[-1] * delta)
    error = fine_point.x - student_point.x
    return lambdas, inner(error, error)


def inner(a, b):
    """The inner product over the images of all ranks."""
    return sum_over_ranks((a * b).sum()).item()


def best_grid(config, solver, nfe, denoiser, x, reference):
    """The hand-made grid on which the plain solver, from x, ends nearest to `reference`."""
    errors = {}
    for kind in GRIDS:
        stages = stages_of(solver, student_grid(config, solver, nfe, kind), nfe)
        error = integrate(denoiser, x, stages) - reference
        errors[kind] = inner(error, error)
    return min(errors, key=errors.get)


@dataclass
class Config(SolverOptions):
    nfe: tuple[int, ...] = option((5,), "network evaluations (official: 10)", low=1)
    solver: tuple[str, ...] = option(tuple(SOLVERS), "solvers to distil", choices=tuple(SOLVERS))
    scale: int = option(10, "C: fine steps per network evaluation (official: 10)", low=1)
    grid: str | None = option(
        None, "time grid of the student; auto: the one best for the plain solver on the fitting "
        "images (official: edm with EDM's networks, else vp)", choices=("auto", *GRIDS),
    )
    output: str = option(
        "x0", "what D is: x0 (official for EDM's networks) or eps (DDPM's)", choices=("x0", "eps")
    )
    schedule: str | None = option(None, "grid of a schedule.json of ld3.py --times coupled")
    lambdas: str | None = option(None, "the lambdas.json of an earlier run: nothing is fitted")
    fit_n: int | None = option(None, "number of fitting images", low=1)
    fit_batch: int | None = option(None, "fitting images per network evaluation", low=1)
    reference_nfe: int | None = option(
        None, "evaluations of the reference of RMSE and --grid auto: Heun, EDM grid", low=2
    )

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        self.grid = "edm" if self.schedule else self.grid  # of the right length, then replaced
        for nfe, solver in product(self.nfe, ("ddim", *self.solver)):
            student_grid(self, solver, nfe)  # may raise


# Official: launch.sh (one batch of 100), the usual FID of 50,000 images.
_OFFICIAL = dict(grid="edm", fit_n=100, fit_batch=100, reference_nfe=200, eval_n=50_000)
_SMALL = dict(grid="auto", fit_n=128, fit_batch=32, reference_nfe=50, eval_n=512)
PRESETS = {
    "digits": _SMALL | dict(fit_n=256, fit_batch=128, reference_nfe=64, eval_batch=128),
    "mnist": _SMALL | dict(eval_batch=32),
    "cifar10": _SMALL | dict(eval_batch=64),
    "cifar10-gpu": _OFFICIAL | dict(eval_batch=256),
    "imagenet64": _OFFICIAL | dict(eval_batch=128),
    "folder": _SMALL | dict(eval_n=500, eval_batch=50),
    "folder-gpu": _OFFICIAL | dict(eval_n=10_000, eval_batch=256),
}
SMOKE = dict(fit_n=8, fit_batch=4, reference_nfe=8, eval_n=32, eval_batch=32)


def reference_grid(config):
    return sigma_grid("edm", config.reference_nfe // 2, config.sigma_min, config.sigma_max)


@torch.no_grad()
def fit(config, run=None, teacher=None):
    """Fit every solver at every --nfe; {(solver, nfe): its entry in lambdas.json}."""
    run = run or Run("dode", config)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    require(config.fit_n >= run.world, "fit_n", config.fit_n, f"there are {run.world} ranks")
    seeds = torch.arange(config.fit_n) + 10**9 * (config.seed + 1)  # evaluation: 0, 1, ...
    seeds = seeds[share_of(config.fit_n)]
    x = config.sigma_max * noise_from_seeds(seeds, teacher.net.img_shape, run.device)
    # Two Points hold up to 16 tensors like x. Where that is much of a GPU's memory they stay
    # on the CPU, and only --fit-batch images at a time are on the GPU.
    if x.is_cuda and 16 * x.nbytes > torch.cuda.mem_get_info()[0] / 4:
        x = x.cpu()

    def denoiser(x, sigma):  # the teacher network, --fit-batch images at a time
        outputs = []
        for images, seed in zip(x.split(config.fit_batch), seeds.split(config.fit_batch)):
            labels = labels_for(seed, teacher.net.label_dim, run.device)
            outputs.append(teacher(images.to(run.device), sigma, labels))
        return torch.cat(outputs).to(x.device)

    state = State(fitted={})
    run.resume(state=state)
    kind, auto = config.grid, config.grid == "auto"
    reference = auto and heun(denoiser, x, reference_grid(config))
    jobs = list(product(config.nfe, config.solver))
    for job in run.steps(len(jobs), "fitting"):
        (nfe, solver), started = jobs[job], time.perf_counter()
        if auto:
            kind = best_grid(config, solver, nfe, denoiser, x, reference)
        student, fine, targets = make_plan(config, solver, nfe, kind)
        lambdas, squares = fit_lambdas(student, fine, targets, denoiser, x, config.output)
        # RMSE to the fine solver's last state
        run.loss = torch.tensor(squares / (config.fit_n * x[0].numel())).sqrt()
        # Of one image; the search for the best grid takes none without --grid auto.
        evaluations = nfe + len(fine) + auto * (len(GRIDS) * nfe + config.reference_nfe)
        state.fitted[solver, nfe] = {
            "solver": solver, "nfe": nfe, "grid": "schedule" if config.schedule else kind,
            "sigmas": student_grid(config, solver, nfe, kind).tolist(), "lambdas": lambdas,
            "fit_evaluations": config.fit_n * evaluations,
            "fit_seconds": round(time.perf_counter() - started, 2),
        }
    if auto:
        grids = ", ".join(f"{s} {nfe} {e['grid']}" for (s, nfe), e in state.fitted.items())
        run.say(f"grids, the best for the plain solver on the fitting images: {grids}")
    return state.fitted


def main():
    config = parse_config(Config, PRESETS, __doc__)
    fitted = read_lambdas(config, partial(student_grid, config)) if config.lambdas else None
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
        if ("ddim", nfe) in fitted:  # known solvers of order 2 on the same grid
            sigmas = torch.tensor(fitted["ddim", nfe]["sigmas"], dtype=torch.float64)
            samplers["ab2", nfe] = sampler(ipndm, sigmas, order=2)
            samplers["dpmpp2m", nfe] = sampler(dpmpp, sigmas, order=2)
        ends = config.sigma_min, config.sigma_max
        name, best = untrained_sampler(teacher, config.dataset, nfe, *ends)
        samplers[name, nfe] = best
    samplers["teacher", 2 * (config.reference_nfe // 2)] = sampler(heun, reference_grid(config))

    rows, pictures = measure(run, samplers, teacher.net, evaluator, reference="teacher")
    # The first rows are, for each solver and NFE, the plain solver and the distilled one.
    for plain, distilled, entry in zip(rows[::2], rows[1::2], fitted.values()):
        plain["grid"] = distilled["grid"] = entry["grid"]
        distilled |= {key: value for key, value in entry.items() if key.startswith("fit_")}
    save_rows(run.out / "samples.png", pictures)
    names = f"network evaluation, 1 to {config.nfe[0]}", "lambda (logarithmic beyond 1)"
    save_curves(run.out / "lambdas.png", curves, *names, log="symlog")
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
