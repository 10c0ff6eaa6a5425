"""What a method is compared with: the best that costs nothing.

A hand-made time grid and a known solver need no training. On every data set with a teacher of
ours, all pairs (solver, grid) were measured at several numbers of network evaluations; whoever
trains something shows the best of them in the same table, measured in the same run.
"""
import json
from functools import cache

import torch

from common.datasets import ASSETS, say_once
from common.diffusion import GRIDS, ddim_levels, sigma_grid, with_labels
from common.machinery.options import require
from common.solvers import ORDERS, SOLVERS, heun, steps_for
from common.teacher import load_teacher, takes_shipped

UNMEASURED = ("unipc", 3, "cosine")  # the choice where there is no measurement


@cache
def _measured():
    """{data set: {NFE as text: {"solver", "order", "grid", "fid", "rmse_to_teacher"}}}.

    The row of the lowest FID* at that count, over the solvers and grids that
    `notebooks/grid_table.py` measured with the shipped teacher; it writes the file.
    """
    return json.loads((ASSETS / "untrained.json").read_text())


def best_untrained(dataset, nfe):
    """(solver, order, grid) with the lowest FID* at `nfe` evaluations: names for `SOLVERS`.

    UniPC of order 3 on the cosine grid for a data set, or a count, that was not measured.
    """
    row = _measured().get(dataset, {}).get(str(nfe))
    return (row["solver"], row["order"], row["grid"]) if row else UNMEASURED


def solver_name(solver, order):
    """As in tables: unipc3, dpmpp2; euler, heun, dpm2 have one order, which is not named."""
    return solver if len(ORDERS[solver]) == 1 else f"{solver}{order}"


def untrained_sampler(teacher, dataset, nfe, sigma_min=0.002, sigma_max=80.0):
    """The best that costs nothing at `nfe` evaluations: (name of the row, sampler).

    sampler(noise, labels) -> x0, noise (B, C, H, W) of unit variance, as `measure` calls it.
    The name is like "untrained (unipc3, cosine)".
    """
    solver, order, grid = best_untrained(dataset, nfe)
    if str(nfe) not in _measured().get(dataset, {}):
        say_once(
            f"untrained: solvers and grids were not measured on {dataset} with {nfe} evaluations; "
            f"{solver_name(solver, order)} on the {grid} grid stands for the best"
        )
    sigmas = sigma_grid(grid, steps_for(solver, nfe), sigma_min, sigma_max)

    def sampler(noise, labels):
        denoiser = with_labels(teacher, labels)
        return SOLVERS[solver](denoiser, sigma_max * noise, sigmas, order=order)

    return f"untrained ({solver_name(solver, order)}, {grid})", sampler


def untrained_samplers(dataset, nfes, device, label_dim):
    """{(name of the row, NFE): sampler} with the shipped teacher, for a network of so many classes.

    {} where none is shipped, where it is not the teacher of this device, or knows other classes.
    """
    if not takes_shipped(dataset, device):
        return {}
    teacher, found = load_teacher(None, dataset, device), {}
    if teacher.net.label_dim not in (0, label_dim):
        return {}
    for nfe in nfes:
        name, sampler = untrained_sampler(teacher, dataset, nfe)
        found[name, nfe] = sampler
    return found


def solver_order_grid(name, nfes=()):
    """"unipc3/cosine" -> ("unipc", 3, "cosine"); the grid may be "even", in equal steps of t.

    Raises UsageError: an unknown name, a count of `nfes` that the solver cannot make.
    """
    known = {solver_name(solver, n): (solver, n) for solver in ORDERS for n in ORDERS[solver]}
    solver, _, grid = name.partition("/")
    grids = ("even", *GRIDS)
    message = f"choose SOLVER/GRID, of {', '.join(known)} and of {', '.join(grids)}"
    require(solver in known and grid in grids, "sampler", name, message)
    for nfe in nfes:
        steps_for(known[solver][0], nfe, ends_in_zero=grid == "even")
    return *known[solver], grid


def reference_sampler(teacher, sigma_max=80.0, steps=18):
    """EDM's own sampler of a teacher, by Heun's method: (network evaluations, sampler).

    Its grid ends at 0, and the last step, to 0, takes one evaluation: 35 for 18 steps.
    """
    sigmas = sigma_grid("edm", steps - 1, sigma_max=sigma_max)
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])

    def sampler(noise, labels):
        return heun(with_labels(teacher, labels), sigma_max * noise, sigmas)

    return 2 * steps - 1, sampler


# ------------------------------------------------ progressive distillation, by pixels or features


def halving_stages(first, last, updates):
    """The stages [(steps of the student, updates)] for first, first / 2, ..., last steps.

    Students of two steps and of one have twice the updates (PD, section 5.2).
    """
    stages, n = [], last
    while n <= first:
        stages.insert(0, (n, 2 * updates if n <= 2 else updates))
        n *= 2
    return stages


def check_stages(config):
    """The numbers of steps from --from-steps down to --to-steps; fills --nfe, or UsageError."""
    counts = [n for n, _ in halving_stages(config.from_steps, config.to_steps, 1)]
    message = f"must be --to-steps {config.to_steps} times a power of 2"
    require(config.from_steps in counts, "from_steps", config.from_steps, message)
    nfe = config.nfe or [n for n in counts if n <= 8] or counts[-1:]
    config.nfe = tuple(sorted(nfe, reverse=True))
    message = f"no such stage; choose from {', '.join(map(str, counts))}"
    for n in config.nfe:
        require(n in counts, "nfe", n, message)
    message = "the loss is of small differences, which float32 alone resolves"
    require(config.precision != "bf16", "precision", config.precision, message)
    return counts


def stage_samplers(config, teacher, students, sample):
    """What a distillation measures: {(name, NFE): sampler(noise, labels) -> x0}.

    At every number of steps of --nfe: the teacher by DDIM, on the students' time grid ("ddim")
    and on EDM's ("ddim-edm"), the best without training, and the students
    {(name, steps): denoiser}. At last the teacher by Heun's method, which is the reference.
    sample(denoiser, noise, sigmas) is the script's own; noise has unit variance.
    """

    def ddim(denoiser, sigmas):
        return lambda noise, labels: sample(with_labels(denoiser, labels), noise, sigmas)

    samplers = {}
    for n in config.nfe:
        sigmas = ddim_levels(n, config.sigma_max)
        nfe = len(sigmas) - 1
        samplers["ddim", nfe] = ddim(teacher, sigmas)
        edm = sigma_grid("edm", n, sigma_max=config.sigma_max)
        samplers["ddim-edm", n] = ddim(teacher, edm)
        if nfe == n:  # else a hand-made grid of n steps has no room below sigma_max
            name, best = untrained_sampler(teacher, config.dataset, n, sigma_max=config.sigma_max)
            samplers[name, n] = best
        for (name, steps), student in students.items():
            if steps == n:
                samplers[name, nfe] = ddim(student, sigmas)
    evaluations, heun_of_teacher = reference_sampler(teacher, config.sigma_max)
    samplers["teacher", evaluations] = heun_of_teacher
    return samplers
