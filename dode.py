"""D-ODE: Distilling ODE Solvers of Diffusion Models into Smaller Steps (Kim, Tang & Yu, CVPR 2024, arXiv:2309.16421).

Idea: consecutive outputs of the network differ along a direction that tells where the trajectory bends. A D-ODE solver replaces each
output D_i by O_i = D_i + lambda_i (D_i - D_{i-1}) and takes the same step as before. The scalars lambda_i, one per network evaluation,
are the least-squares fit of the student's states to those of a teacher solver with C times the steps: no training, no gradients.

Fit, step after step, each from the states that the corrected steps before it have reached:
    lambda_i = argmin |X_i - x_i - lambda delta_i|^2 = <delta_i, X_i - x_i> / <delta_i, delta_i>
    x_i: the plain solver's step; delta_i: how far a lambda of 1 would move it; X_i: the teacher's state at the same noise level;
    the inner products run over all pixels of all images of the fitting set.
The paper's D is the data or the noise, whichever a network predicts. Here it is the data (--output eps: the noise), and lambda is
counted *inside* the step, as in O_i, so that solvers can be compared: 1/2 in noise is the two-step Adams-Bashforth rule (row ab2).

Differences from the paper and its official code (D-ODE-Solvers, commit 6dc5a1c):
 1. Grids: every level of the student is one of the teacher's. Theirs do not meet: EDM's teacher has its own grid of C N - 1 intervals
    and is compared by its count of steps, so the targets are noisier than the student's state (10 steps, C = 10: 45.0 for 42.4, ...,
    0.0141 for 0.002); their VP targets are 90 of 1000 timesteps too noisy. --official-grid restores EDM's form, for all solvers.
 2. The walk ends at sigma_min (theirs: N - 1 steps to sigma_min = 0.002, and one more, worth almost nothing, to 0).
 3. The fit: any number of images, in batches, over all ranks (theirs: the first batch of each rank, so that the result depends on the
    number of GPUs), and never on images that are evaluated (theirs are counted among the 50,000).
 4. Where lambda stands: theirs outside the step (ours times the output's weight in the move), except in DPM-Solver, where as here.
 5. First step: not corrected, as in their code for EDM. --output eps takes over the rule of their noise prediction, which corrects
    the first output against the input x_T.
 6. DPM-Solver-2 has its inner level in the middle in log sigma, DEIS integrates exactly (theirs: in the middle in VP time; a Riemann
    sum). With an odd budget both two-evaluation solvers end with an Euler step, so that every --nfe is met exactly.
Measured: digits, RMSE to a fine trajectory, plain -> distilled, 2,048 held-out seeds, 256 for the fit; 8 to 90 s a fit on one CPU core
    nfe   ddim           ipndm          dpm2           deis2          deis3          heun
      5   .226 -> .171   .199 -> .151   .195 -> .159   .179 -> .149   .183 -> .151   1.08 -> .244
     10   .158 -> .102   .088 -> .087   .197 -> .126   .096 -> .089   .085 -> .087   .302 -> .180
     20   .101 -> .052   .030 -> .038   .054 -> .045   .042 -> .039   .032 -> .035   .076 -> .073
    Accurate solvers gain nothing, or lose: the fit is greedy (nearest to the teacher at each level, not at the end), and its squares
    are those of the few images that lie between two digits; iPNDM at 20 then gets worse on 94 of 100 images, with 768 as with 128
    for the fit. DDIM with 10 evaluations, 512 seeds, on the official student grid: .173, distilled .122, with official targets .215.
    python dode.py                                             # digits, all six solvers at 5 evaluations, 33 s on 2 CPU cores
    python dode.py --solver ddim heun --nfe 3 5 10 20          # some solvers, several budgets
    python dode.py --lambdas runs/dode-digits/lambdas.json     # measure saved lambdas, fit nothing
    python dode.py --dataset cifar10 --nfe 10                  # one GPU
"""
import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from common.diffusion import GRIDS, sigma_grid, with_labels
from common.fid import labels_for, make_judge, measure
from common.plots import save_curves, save_rows
from common.solvers import TWO_EVALUATIONS, deis, dpm2, dpmpp, euler, heun, ipndm
from common.teacher import load_teacher
from common.training import (SCORES, Options, Run, UsageError, atomic_write, cli, fill_from_presets, noise_from_seeds, option, parse_config,
                             require, save_json, share_of, sum_over_ranks, table)

SOLVERS = {"ddim": euler, "ipndm": ipndm, "dpm2": dpm2, "deis2": partial(deis, order=2), "deis3": partial(deis, order=3), "heun": heun}


@dataclass
class Config(Options):
    teacher: str | None = option(None, "teacher checkpoint (default: the data set's own)")
    nfe: tuple[int, ...] = option((5,), "network evaluations of the student, one or several budgets (official commands: 10)")
    solver: tuple[str, ...] = option(tuple(SOLVERS), "solvers to distil (the paper's)", choices=tuple(SOLVERS))
    scale: int = option(10, "C: the teacher takes C steps for each evaluation of the student (official: 10)")
    grid: str = option("edm", "the student's time grid (official EDM code: edm)", choices=GRIDS)
    sigma_min: float = option(0.002, "lowest noise level (EDM)")
    sigma_max: float = option(80.0, "highest noise level (EDM)")
    official_grid: bool = option(False, "the authors' grids: the student's ends in 0, the teacher's levels are not the student's")
    output: str = option("x0", "what is corrected: the data (official for EDM) or the noise (official for DDPM)", choices=("x0", "eps"))
    lambdas: str | None = option(None, "a lambdas.json written by an earlier run: fit nothing")
    fit_n: int | None = option(None, "images of the fitting set (official: one batch of 100)")
    fit_batch: int | None = option(None, "of these, how many at a time")
    reference_nfe: int | None = option(None, "evaluations of the fine trajectory that RMSE is measured to: Heun, half as many steps")

    def __post_init__(self):
        fill_from_presets(self, PRESETS, SMOKE)
        self.nfe, self.solver = ((v,) if isinstance(v, (int, str)) else tuple(dict.fromkeys(v)) for v in (self.nfe, self.solver))
        for name in ("scale", "fit_n", "fit_batch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.reference_nfe >= 2, "reference_nfe", self.reference_nfe, "must be at least 2")
        for solver in self.solver:
            require(solver in SOLVERS, "solver", solver, f"unknown, choose from {', '.join(SOLVERS)}")
        for nfe in self.nfe:
            require(nfe >= 1, "nfe", nfe, "at least 1 network evaluation is needed")
            require(not self.official_grid or nfe >= 3, "nfe", nfe, "--official-grid needs at least 3: its last step is the one to 0")
        require(not self.official_grid or self.grid == "edm", "grid", self.grid, "--official-grid means the edm grid")
        sigma_grid(self.grid, 1, self.sigma_min, self.sigma_max)  # raises on a range that is not one


# Official: distilled_sampler.py and launch.sh (C, batch of 100); eval_n 50k: the usual FID.
_OFFICIAL = dict(fit_n=100, fit_batch=100, reference_nfe=200, eval_n=50_000, eval_batch=256)
PRESETS = {
    "digits": {**_OFFICIAL, "fit_n": 256, "fit_batch": 128, "reference_nfe": 64, "eval_n": 512, "eval_batch": 128},
    "mnist": {**_OFFICIAL, "eval_n": 10_000},
    "cifar10": _OFFICIAL,
    "imagenet64": {**_OFFICIAL, "eval_batch": 128},
    "folder": {**_OFFICIAL, "eval_n": 10_000},
}
SMOKE = dict(fit_n=8, fit_batch=4, reference_nfe=8, eval_n=32, eval_batch=32)


# ------------------------------------------------------------------------------------------------- solvers, one evaluation at a time

class Stage(NamedTuple):
    """One network evaluation and the move after it: x <- start + sum_j weights[j] slope_j, the newest slope first."""
    sigma: float    # the level at which the network is asked
    to: float       # the level on which the move lands
    second: bool    # start: where the step began (the later evaluations of a Runge-Kutta step), else where the network was asked
    weights: tuple  # any number of floats


def stages_of(solver, sigmas, nfe=None):
    """A solver of common.solvers (by our name) on the levels `sigmas` (n+1,), as a list of Stage, at most `nfe` of them.

    All solvers are linear in the slopes they are given. Feed them unit vectors, and their states are the weights.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    last_is_euler = solver in TWO_EVALUATIONS and nfe == 2 * len(sigmas) - 3  # an odd budget: the second evaluation is missing
    unit = torch.eye(2 * len(sigmas), dtype=torch.float64)
    levels, states, begins = [], [], []

    def unit_slopes(x, sigma):
        levels.append(float(sigma))
        states.append(x)
        return x - sigma * unit[len(levels) - 1: len(levels)]  # slope = (x - D) / sigma

    def note(i, x):
        begins.append(len(levels))  # a step begins with this evaluation

    x = torch.zeros_like(unit[:1])
    if len(sigmas) > 2 or not last_is_euler:
        x = SOLVERS[solver](unit_slopes, x, sigmas[:-1] if last_is_euler else sigmas, callback=note)
    if last_is_euler:
        x = euler(unit_slopes, x, sigmas[-2:], callback=note)
    levels.append(float(sigmas[-1]))
    states.append(x)
    stages = []
    for k in range(len(levels) - 1):
        weights = (states[k + 1] - states[k if k in begins else k - 1])[0, : k + 1].flip(0).tolist()
        weights = weights[: max(j for j, w in enumerate(weights) if w) + 1]
        stages.append(Stage(levels[k], levels[k + 1], k not in begins, tuple(weights)))
    return stages


def begin(x, sigma, output="x0"):
    """The state of a walk: where it is, where its step began, its last slopes (at most 4), the output before the next one."""
    return {"x": x, "start": x, "slopes": [], "output": None if output == "x0" else x / (1 + sigma**2) ** 0.5}  # x_T, unit variance


def step(denoiser, state, stage, output="x0"):
    """One evaluation: the next state if lambda = 0, and `delta`, what lambda = 1 would add to it. (B, C, H, W), float64.

    The output that is corrected is the network's own, except in a multistep solver: there it is the combination it walks along.
    """
    x, h = state["x"], stage.to - stage.sigma
    denoised = denoiser(x, stage.sigma)
    slopes = [(x - denoised) / stage.sigma, *state["slopes"][:3]]
    start = state["start"] if stage.second else x
    moved = start + sum(w * slope for w, slope in zip(stage.weights, slopes))
    slope, gain = slopes[0], stage.weights[0]
    if not stage.second:
        slope, gain = sum(w / h * slope for w, slope in zip(stage.weights, slopes)), h
    if output == "x0":  # the same as data, D = x - sigma slope, without cancellation; and its weight in the move
        slope, gain = denoised + stage.sigma * (slopes[0] - slope), -gain / stage.sigma
    delta = torch.zeros_like(x) if state["output"] is None else gain * (slope - state["output"])
    return {"x": moved, "start": start, "slopes": slopes, "output": slope}, delta


def walk(denoiser, x, stages, lambdas=None, output="x0"):
    """A solver, plain or distilled: x at stages[0].sigma -> x at the last stage's level."""
    state = begin(x.double(), stages[0].sigma, output)
    for k, stage in enumerate(stages):
        state, delta = step(denoiser, state, stage, output)
        if lambdas is not None:
            state["x"] = state["x"] + lambdas[k] * delta
    return state["x"]


# ------------------------------------------------------------------------------------------------------------------------ the fit

def student_grid(config, solver, nfe):
    """Levels (n+1,) for `nfe` evaluations: n = nfe, or half of it (rounded up) for a solver with two evaluations a step."""
    n = (nfe + 1) // 2 if solver in TWO_EVALUATIONS else nfe
    if config.official_grid:
        return torch.cat([sigma_grid("edm", n - 1, config.sigma_min, config.sigma_max), torch.zeros(1, dtype=torch.float64)])
    return sigma_grid(config.grid, n, config.sigma_min, config.sigma_max)


def teacher_grid(student, scale):
    """(levels, targets): C levels for each evaluation of the student; its stage k is compared with the teacher at levels[targets[k]].

    Between two of the student's levels the teacher's are EDM's: equal steps in sigma^(1/7). On the edm grid: the edm grid of C N steps.
    """
    levels, targets = [student[0].sigma], []
    for to, group in groupby(student, key=lambda stage: stage.to):  # Heun's two stages land on the same level
        count = len(list(group))
        ends = torch.tensor([levels[-1], to], dtype=torch.float64) ** (1 / 7)
        u = torch.linspace(0, 1, scale * count + 1, dtype=torch.float64)[1:-1]
        levels += [*((ends[0] + u * (ends[1] - ends[0])) ** 7).tolist(), to]
        targets += [len(levels) - 1] * count
    return torch.tensor(levels, dtype=torch.float64), targets


def official_teacher_grid(student, scale, sigma_min, sigma_max):
    """The same of the official EDM code: its own grid, compared by the count of evaluations and not by the level."""
    levels = sigma_grid("edm", scale * len(student) - 1, sigma_min, sigma_max)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)]), [(k + 1) * scale for k in range(len(student))]


def make_plan(config, solver, nfe):
    """(student's stages, teacher's stages, targets). The teacher is the same solver, but DDIM for DPM-Solver and Heun (as in the paper)."""
    student = stages_of(solver, student_grid(config, solver, nfe), nfe)
    levels, targets = (official_teacher_grid(student, config.scale, config.sigma_min, config.sigma_max) if config.official_grid
                       else teacher_grid(student, config.scale))
    return student, stages_of("ddim" if solver in TWO_EVALUATIONS else solver, levels), targets


@torch.no_grad()
def fit_lambdas(student, teacher, targets, batches, model, start, output="x0", device="cpu", folder=None):
    """One lambda per stage, and the root of the sum of squares left at the last; model(batch) -> denoiser, start(batch) -> its first x.

    Stages outside, batches inside: every lambda is needed before the next stage. Meanwhile the states of the other batches lie in files
    below `folder`: memory does not grow with the fitting set. `batches` are this rank's own; the inner products are summed over all ranks.
    """
    lambdas, done = [], 0
    with tempfile.TemporaryDirectory(".part", "states-", folder) as folder:  # the name says: to be deleted with the rest of a killed run
        for stage, target in zip(student, targets):
            sums = torch.zeros(3, dtype=torch.float64, device=device)
            for b, batch in enumerate(batches):
                denoiser = model(batch)
                if lambdas:
                    ours, theirs, delta = torch.load(Path(folder, str(b)), map_location=device, weights_only=True)
                    ours["x"] = ours["x"] + lambdas[-1] * delta
                else:
                    ours, theirs = begin(start(batch), stage.sigma, output), begin(start(batch), teacher[0].sigma)
                for teacher_stage in teacher[done:target]:
                    theirs, _ = step(denoiser, theirs, teacher_stage)
                ours, delta = step(denoiser, ours, stage, output)
                rest = theirs["x"] - ours["x"]
                sums += torch.stack([(delta * rest).sum(), (delta * delta).sum(), (rest * rest).sum()])
                atomic_write(Path(folder, str(b)), partial(torch.save, (ours, theirs, delta)))
            across, length, rest = sum_over_ranks(sums).tolist()
            lambdas.append(across / length if length else 0.0)  # EDM's first stage has nothing to differ from
            done = target
    return lambdas, max(0.0, rest - lambdas[-1] * across) ** 0.5


class Fitted(dict):
    """(solver, nfe) -> its entry in lambdas.json; what a resumed run needs."""

    def state_dict(self):
        return {"entries": list(self.values())}

    def load_state_dict(self, state):
        self.update({(entry["solver"], entry["nfe"]): entry for entry in state["entries"]})


def fit(config, run=None, teacher=None):
    """Fit every solver at every budget of `config`; return {(solver, nfe): {"lambdas": one per evaluation, "sigmas": the grid, ...}}."""
    run = run or Run("dode", config)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    if config.lambdas:
        return read_lambdas(config)
    shape = teacher.net.img_shape
    seeds = torch.arange(config.fit_n) + 10**9 * (config.seed + 1)  # the evaluation uses 0, 1, 2, ...
    batches = [batch for batch in seeds[share_of(config.fit_n)].split(config.fit_batch) if len(batch)]  # of this rank

    def model(batch):
        return with_labels(teacher, labels_for(batch, teacher.net.label_dim, run.device))

    def start(batch):
        return config.sigma_max * noise_from_seeds(batch, shape, run.device)

    fitted = Fitted()
    jobs = [(solver, nfe) for nfe in config.nfe for solver in config.solver]
    for job in run.steps(run.restore({"fitted": fitted}), len(jobs), {"fitted": fitted}, "fitting"):
        (solver, nfe), started = jobs[job], time.perf_counter()
        student, teacher_stages, targets = make_plan(config, solver, nfe)
        lambdas, rest = fit_lambdas(student, teacher_stages, targets, batches, model, start, config.output, run.device, run.out)
        run.loss = torch.tensor(rest / (config.fit_n * shape[0] * shape[1] * shape[2]) ** 0.5)  # RMSE to the teacher's last state
        fitted[solver, nfe] = {"solver": solver, "nfe": nfe, "sigmas": student_grid(config, solver, nfe).tolist(), "lambdas": lambdas,
                               "fit_evaluations": config.fit_n * (len(student) + len(teacher_stages)),
                               "fit_seconds": round(time.perf_counter() - started, 2)}
        run.log(what="fitted", **fitted[solver, nfe])
    return dict(fitted)


# ------------------------------------------------------------------------------------------------------- lambdas.json and measurement

def write_lambdas(path, config, fitted):
    save_json(path, {"method": "dode", "dataset": config.dataset, "teacher": config.teacher or config.dataset, "output": config.output,
                     "scale": config.scale, "fit_n": config.fit_n, "official_grid": config.official_grid, "solvers": list(fitted.values())})


def read_lambdas(config):
    """What `fit` returns, from a lambdas.json; UsageError if the file is none, or was made for another solver, grid, budget or output."""
    path = config.lambdas
    try:
        file = json.loads(Path(path).read_text())
        output, entries = file["output"], {(entry["solver"], entry["nfe"]): entry for entry in file["solvers"]}
        grids = {key: torch.tensor(entry["sigmas"], dtype=torch.float64) for key, entry in entries.items()}
        finite = all(torch.tensor(entry["lambdas"], dtype=torch.float64).isfinite().all() for entry in entries.values())
    except OSError as error:
        raise UsageError(f"--lambdas {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(f"--lambdas {path}: not a lambdas.json of dode.py ({type(error).__name__}: {error})".split("\n")[0]) from None
    require(finite, "lambdas", path, "holds values that are not finite")
    require(output == config.output, "lambdas", path, f"was made with --output {output}; this run has --output {config.output}")
    chosen = {}
    for nfe in config.nfe:
        for solver in config.solver:
            key, there = (solver, nfe), ", ".join(f"{s} at {n}" for s, n in entries)
            require(key in entries, "lambdas", path, f"holds {there} evaluations; --solver {solver} --nfe {nfe} is not among them")
            levels = student_grid(config, solver, nfe)
            require(grids[key].shape == levels.shape and torch.allclose(grids[key], levels, rtol=1e-9, atol=0), "lambdas", path,
                    f"{solver} at {nfe}: made for the grid {short(grids[key])}; this run walks {short(levels)}")
            count = len(stages_of(solver, levels, nfe))
            require(len(entries[key]["lambdas"]) == count, "lambdas", path,
                    f"{solver} at {nfe}: has {len(entries[key]['lambdas'])} lambdas, {count} are needed")
            chosen[key] = entries[key]
    return chosen


def short(levels):
    return ", ".join(f"{level:.4g}" for level in levels.flatten().tolist())


def evaluate(config, run, teacher, judge, fitted):
    """Every solver plain and distilled, and two baselines, from the same held-out noise (seeds 0 ... eval_n - 1): rows and pictures.

    rmse_to_teacher: root mean square over images and pixels in [-1, 1], against the fine trajectory (row `teacher`).
    """
    samplers, cost, shown, curves = {}, {}, [], {}

    def row(name, nfe, solver, **more):
        samplers[name, nfe] = lambda noise, labels: solver(with_labels(teacher, labels), config.sigma_max * noise)
        cost[name, nfe] = more

    end = torch.zeros(1 if config.official_grid else 0, dtype=torch.float64)
    fine = torch.cat([sigma_grid("edm", config.reference_nfe // 2, config.sigma_min, config.sigma_max), end])
    row("teacher", 2 * (len(fine) - 1) - len(end), lambda denoiser, x: heun(denoiser, x, fine))
    for (solver, nfe), entry in fitted.items():
        stages = stages_of(solver, entry["sigmas"], nfe)
        row(solver, len(stages), partial(walk, stages=stages))
        row(f"d-{solver}", len(stages), partial(walk, stages=stages, lambdas=entry["lambdas"], output=config.output),
            **{k: entry[k] for k in ("fit_evaluations", "fit_seconds")})
        if nfe == config.nfe[0]:  # the pictures show the first budget
            shown += [f"{solver} {len(stages)}", f"d-{solver} {len(stages)}"]
            curves[f"d-{solver}"] = ([s.sigma for s in stages], [max(-4, min(4, v)) for v in entry["lambdas"]])
    for nfe in config.nfe:
        sigmas = student_grid(config, "ddim", nfe)
        row("ab2", nfe, lambda denoiser, x, sigmas=sigmas: ipndm(denoiser, x, sigmas, order=2))  # lambda = 1/2 in noise
        row("dpmpp2m", nfe, lambda denoiser, x, sigmas=sigmas: dpmpp(denoiser, x, sigmas, order=2))
    rows, pictures = measure(samplers, config, teacher.net.img_shape, run.device, judge, teacher.net.label_dim, truth=True)
    if run.rank == 0:
        save_rows(run.out / "samples.png", {k: v for k, v in pictures.items() if k in shown or k.startswith("teacher")})
        save_curves(run.out / "lambdas.png", curves, "sigma", "lambda", f"{config.dataset}, {config.nfe[0]} evaluations (cut at +-4)",
                    log="x")
    rows = [{**row, **more} for row, more in zip(rows, cost.values())]
    return [*rows[1:], rows[0]]


def main():
    config = parse_config(Config, PRESETS, __doc__)
    if config.lambdas:
        read_lambdas(config)  # before any work
    run = Run("dode", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    judge = make_judge(config, run.device)
    fitted = fit(config, run, teacher)
    if not config.lambdas and run.rank == 0:
        write_lambdas(run.out / "lambdas.json", config, fitted)
    results = evaluate(config, run, teacher, judge, fitted)
    run.metrics(results, teacher=config.teacher or f"{config.dataset} (shipped or cached)")
    run.say(table(results, ["name", "nfe", "rmse_to_teacher", *SCORES]))
    run.say("fitting cost, image evaluations and seconds: " + ", ".join(
        f"d-{solver} {nfe}: {entry['fit_evaluations']:,}, {entry['fit_seconds']:.1f}" for (solver, nfe), entry in fitted.items()))
    files = "metrics.json, samples.png, lambdas.png" + ("" if config.lambdas else ", lambdas.json")
    run.say(f"{run.seconds():.0f} s; results in {run.out}: {files}")


if __name__ == "__main__":
    cli(main)
