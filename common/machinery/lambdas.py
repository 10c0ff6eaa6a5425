"""lambdas.json of dode.py: a scalar for each network evaluation, and the grid it belongs to."""
from itertools import product

import torch

from common.machinery.files import read_json
from common.machinery.foreign import one_line, refusing
from common.machinery.options import require

MOST = 1e9  # of |lambda|: fitted ones reach thousands, in Heun's solver


def read_lambdas(config, grid_of):
    """{(solver, nfe): an entry of --lambdas} for each --nfe and --solver.

    grid_of(solver, nfe, kind): the levels that this run needs, kind being the file's grid. Raises
    UsageError where the file is none, or its options are not those of this run.
    """
    def about(output, sigmas, usable, count):
        grid = ", ".join(f"{sigma:.6g}" for sigma in sigmas)
        return f"--output {output}, {usable} of {count} lambdas usable, grid {grid}"

    what, has, entries = "a lambdas.json of dode.py", {}, {}
    file = read_json(config.lambdas, "lambdas", what)
    with refusing(f"--lambdas {config.lambdas}: not {what}"):
        for entry in file["solvers"]:
            job = entry["solver"], entry["nfe"]
            sigmas, lambdas = (
                torch.tensor(entry[key], dtype=torch.float64) for key in ("sigmas", "lambdas")
            )
            usable = int((lambdas.abs() <= MOST).sum())  # NaN is not
            has[job] = about(file["output"], sigmas.tolist(), usable, len(lambdas))
            fit = {k: float(entry[k]) for k in ("fit_evaluations", "fit_seconds") if k in entry}
            kind = one_line(entry.get("grid", file.get("grid")))
            entries[job] = {"grid": kind, "lambdas": lambdas.tolist(), **fit}
    chosen, found = {}, [f"{solver} at {nfe}" for solver, nfe in has]
    for nfe, solver in product(config.nfe, config.solver):
        job = f"--solver {solver} --nfe {nfe}"
        message = one_line(f"has {found}; {job} is needed", most=1000)
        require((solver, nfe) in has, "lambdas", config.lambdas, message)
        entry = entries[solver, nfe]
        sigmas = grid_of(solver, nfe, entry["grid"]).tolist()
        needs = about(config.output, sigmas, nfe, nfe)
        message = one_line(f"has {has[solver, nfe]}; {job} needs {needs}", most=1000)
        require(has[solver, nfe] == needs, "lambdas", config.lambdas, message)
        chosen[solver, nfe] = {"solver": solver, "nfe": nfe, "sigmas": sigmas, **entry}
    return chosen
