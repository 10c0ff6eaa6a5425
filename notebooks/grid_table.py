"""Every solver on every hand-made time grid: what costs nothing, measured.

    python notebooks/grid_table.py                                  # digits: 25 minutes of a core
    python notebooks/grid_table.py --dataset mnist --data-dir DIR   # an hour of a core
    python notebooks/grid_table.py --keep                           # also keep the table

The images of the seeds 0, 1, 2, ... of every cell (solver, grid, network evaluations) are compared
with those that UniPC of order 3 makes of the same noise with 20 evaluations on the EDM grid (LD3's
teacher; the row "fine"), and with the real images by FID* and KID. Heun and DPM-Solver-2 take two
evaluations a step, so that odd counts are not theirs. With one evaluation all solvers and grids
are the same: DDIM's one step stands for all.

A cell is measured once: a run that was stopped goes on, and one with more solvers, grids or counts
measures those. The kept tables of digits and MNIST are full, CIFAR-10's is not: UniPC-3 on all
grids, up to 8 evaluations; on logsnr, edm, cosine and vp all solvers with 2 and 4, the better ones
with 3, 5 and 8.

--keep writes notebooks/results/DATASET-grids/metrics.json, and the pair of lowest FID* at each
count into common/assets/untrained.json, which every script compares itself with.
"""
import json
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from common.baselines import solver_name
from common.datasets import ASSETS
from common.diffusion import GRIDS, sigma_grid, with_labels
from common.fid import make_evaluator, measure
from common.machinery.files import save_json
from common.machinery.options import TeacherOptions, cli, complete, option, parse_config
from common.machinery.run import Run
from common.solvers import ORDERS, SOLVERS, TWO_EVALUATIONS, steps_for, unipc
from common.teacher import load_teacher

RESULTS = HERE / "results"
NAMES = {  # name in the table -> (solver, order)
    solver_name(solver, order): (solver, order)
    for solver in SOLVERS for order in ORDERS[solver]
}
MOST = ("euler", "heun", "ipndm4", "dpmpp2", "dpmpp3", "dpm2", "deis2", "deis3", "unipc2",
        "unipc3")
SIGMAS = 0.002, 80.0  # sigma_min, sigma_max
EQUAL = ("dataset", "teacher", "eval_n", "smoke")  # what cells of one table share


@dataclass
class Config(TeacherOptions):
    solver: tuple[str, ...] = option(MOST, "solvers and their orders", choices=tuple(NAMES))
    grid: tuple[str, ...] = option(GRIDS, "time grids", choices=GRIDS)
    nfe: tuple[int, ...] = option((4, 5, 3, 8, 2, 10, 6, 1), "network evaluations", low=1)
    keep: bool = option(False, "write the kept table and untrained.json")

    def __post_init__(self):
        complete(self, PRESETS, dict(eval_n=16, eval_batch=16))


PRESETS = {"digits": dict(eval_n=1024, eval_batch=128), "mnist": dict(eval_n=512, eval_batch=32),
           "cifar10": dict(eval_n=512, eval_batch=64)}


class Remembering:
    """A denoiser that evaluates the same images at the same noise level once.

    All cells share their first evaluation, at sigma_max; many share more.
    """

    def __init__(self, teacher):
        self.teacher, self.known = teacher, {}

    def __call__(self, x, sigma, labels=None):
        key = float(sigma), hash(x.numpy().tobytes())
        if key not in self.known:
            self.known[key] = self.teacher(x, sigma, labels)
        return self.known[key]

    def forget(self):
        """All but the first evaluations."""
        self.known = {key: x for key, x in self.known.items() if key[0] == SIGMAS[1]}


def samplers_of(denoiser, names, grid, nfe):
    """{(name, nfe): sampler(noise, labels)} of the solvers that can take `nfe` evaluations."""
    def sample(solver, order, sigmas, noise, labels):
        x = SIGMAS[1] * noise.cpu()
        return SOLVERS[solver](with_labels(denoiser, labels), x, sigmas, order=order)

    samplers = {}
    for name in ("euler",) if nfe == 1 else names:
        solver, order = NAMES[name]
        if nfe % 2 == 0 or solver not in TWO_EVALUATIONS:
            sigmas = sigma_grid(grid, steps_for(solver, nfe), *SIGMAS)
            samplers[f"{name}, {grid}", nfe] = partial(sample, solver, order, sigmas)
    return samplers


def best_by_count(rows):
    """{NFE: the row with the lowest FID} of a table."""
    best = {}
    for nfe in sorted({row["nfe"] for row in rows if "grid" in row}):
        candidates = [row for row in rows if row["nfe"] == nfe and "grid" in row]
        # With one evaluation all grids are equal.
        best[nfe] = min(candidates, key=lambda row: (row["fid"], row["grid"] != "cosine"))
    return best


def best_rows(rows):
    """What `common.baselines` reads of a table: {NFE as text: columns of the best row}."""
    columns = ("solver", "order", "grid", "fid", "rmse_to_teacher")
    best = best_by_count(rows)
    return {str(nfe): {column: row[column] for column in columns} for nfe, row in best.items()}


def keep(metrics):
    """Write the kept table, one row a line, and untrained.json from all kept tables."""
    lines = [json.dumps(row) for row in metrics.pop("results")]
    head = json.dumps(metrics, indent=1).removesuffix("\n}")
    path = RESULTS / f"{metrics['dataset']}-grids" / "metrics.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(head + ',\n "results": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")
    tables = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*-grids/metrics.json"))]
    save_json(ASSETS / "untrained.json", {t["dataset"]: best_rows(t["results"]) for t in tables})


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("grids", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    evaluator = make_evaluator(config, run.device)
    about = {name: getattr(config, name) for name in EQUAL}
    path, cells = run.out / "cells.json", {"about": about, "rows": {}}
    if path.exists() and (found := json.loads(path.read_text()))["about"] == about:
        cells = found
    denoiser, rows = Remembering(teacher), cells["rows"]

    def fine(noise, labels):
        key = hash(noise.cpu().numpy().tobytes())
        if key not in images:
            x = SIGMAS[1] * noise.cpu()
            sigmas = sigma_grid("edm", 20, *SIGMAS)
            images[key] = unipc(with_labels(denoiser, labels), x, sigmas)
        return images[key]

    images = {}
    for nfe, grid in product(config.nfe, config.grid):
        samplers = samplers_of(denoiser, config.solver, grid, nfe)
        missing = {k: v for k, v in samplers.items() if f"{k[0]}, {k[1]}" not in rows}
        if not missing:
            continue
        samplers = {("fine", 20): fine, **missing}
        measured, _ = measure(run, samplers, teacher.net, evaluator, reference="fine")
        denoiser.forget()
        rows["fine"] = measured[0]
        for row in measured[1:]:
            solver, order = NAMES[row["name"].split(",")[0]]
            about = {"solver": solver, "order": order, "grid": grid}
            rows[f"{row['name']}, {row['nfe']}"] = row | about
        save_json(path, cells)
    order = [*NAMES, *GRIDS]
    rows = sorted(rows.values(), key=lambda row: (
        row["nfe"], [order.index(part) for part in row["name"].split(", ") if part in order]
    ))
    run.finish(rows)
    if config.keep:
        keep(json.loads((run.out / "metrics.json").read_text()))


if __name__ == "__main__":
    cli(main)
