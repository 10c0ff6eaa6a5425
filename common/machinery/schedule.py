"""What ld3.py and dode.py learn, as files of JSON.

schedule.json is a time grid; its `sigmas` is also what diffusers' `sigmas=` takes. lambdas.json has
a scalar for each network evaluation, and the grid that it belongs to.
"""
import json
from itertools import product

import torch

from common.diffusion import check_grid
from common.machinery.files import save_json
from common.machinery.foreign import Refused, one_line, read_file, refusing
from common.machinery.options import require
from common.machinery.ranks import rank_and_world

MOST_JSON = 2**22  # bytes of either file, which have thousands
MOST = 1e9  # of |lambda|: fitted ones reach thousands, in Heun's solver


def save_schedule(path, sigmas, sigmas_net, **about):
    """sigmas, sigmas_net: (n+1,). Of the latter diffusers knows nothing: learn coupled times."""
    if rank_and_world()[0] == 0:
        grids = {"sigmas": sigmas.tolist(), "sigmas_net": sigmas_net.tolist()}
        save_json(path, {"method": "ld3", **about, **grids})


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def read_schedule(path):
    """What a schedule.json says, its sigmas, a grid, and its finite sigmas_net; or UsageError."""
    with refusing(f"--schedule {path}: not a schedule.json of ld3.py"):
        about = json.loads(read_file(path, MOST_JSON))
        sigmas, sigmas_net = _tensor(about["sigmas"]), _tensor(about["sigmas_net"])
        if not sigmas_net.isfinite().all():
            raise Refused("`sigmas_net` has values that are not finite")
        return about, check_grid(sigmas, f"--schedule {path}: `sigmas`"), sigmas_net


def load_schedule(path, example, hint=""):
    """sigmas, sigmas_net of a schedule.json, float64, as many as in the grid `example`.

    Raises UsageError if it is none, or if its length or ends are not those of `example`.
    """
    _, sigmas, sigmas_net = read_schedule(path)
    fits = sigmas.shape == sigmas_net.shape == example.shape
    fits = fits and torch.allclose(sigmas[[0, -1]], example[[0, -1]])
    found, needed = (f"{len(s)} levels from sigma {s[0]:g} to {s[-1]:g}" for s in (sigmas, example))
    require(fits, "schedule", path, f"has {found}; this run needs {needed}{hint}")
    return sigmas, sigmas_net


def coupled_schedule(path, example):
    """sigmas of a schedule.json whose sigmas_net are the same. Raises UsageError as above."""
    hint = ": with dpm2 and heun of half as many steps, leave them out of --solver"
    sigmas, sigmas_net = load_schedule(path, example, hint)
    message = "its sigmas_net are not its sigmas; learn it with --times coupled"
    require(torch.equal(sigmas, sigmas_net), "schedule", path, message)
    return sigmas


def read_lambdas(config, grid_of):
    """{(solver, nfe): an entry of --lambdas} for each --nfe and --solver.

    grid_of(solver, nfe, kind): the levels that this run needs, kind being the file's grid. Raises
    UsageError where the file is none, or its options are not those of this run.
    """
    def check(fits, message):
        require(fits, "lambdas", config.lambdas, one_line(message, most=1000))

    def about(output, sigmas, usable, count):
        grid = ", ".join(f"{sigma:.6g}" for sigma in sigmas)
        return f"--output {output}, {usable} of {count} lambdas usable, grid {grid}"

    chosen = {}
    with refusing(f"--lambdas {config.lambdas}: not a lambdas.json of dode.py"):
        file = json.loads(read_file(config.lambdas, MOST_JSON))
        entries = {(entry["solver"], entry["nfe"]): entry for entry in file["solvers"]}
        found = [f"{solver} at {nfe}" for solver, nfe in entries]
        for nfe, solver in product(config.nfe, config.solver):
            job = f"--solver {solver} --nfe {nfe}"
            check((solver, nfe) in entries, f"has {found}; {job} is needed")
            entry = entries[solver, nfe]
            lambdas, kind = _tensor(entry["lambdas"]), one_line(entry.get("grid", file.get("grid")))
            usable = int((lambdas.abs() <= MOST).sum())  # NaN is not
            has = about(file["output"], _tensor(entry["sigmas"]).tolist(), usable, len(lambdas))
            sigmas = grid_of(solver, nfe, kind).tolist()
            needs = about(config.output, sigmas, nfe, nfe)
            check(has == needs, f"has {has}; {job} needs {needs}")
            chosen[solver, nfe] = {
                "solver": solver, "nfe": nfe, "sigmas": sigmas, "grid": kind,
                "lambdas": lambdas.tolist(),
                **{k: float(entry[k]) for k in ("fit_evaluations", "fit_seconds") if k in entry},
            }
    return chosen
