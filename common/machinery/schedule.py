"""Time grids as files: schedule.json. Its `sigmas` is also what diffusers' `sigmas=` takes."""
import torch

from common.diffusion import check_grid
from common.machinery.files import read_numbers, save_json
from common.machinery.options import require
from common.machinery.ranks import rank_and_world


def save_schedule(path, sigmas, sigmas_net, **about):
    """sigmas, sigmas_net: (n+1,). Of the latter diffusers knows nothing: learn coupled times."""
    if rank_and_world()[0] == 0:
        grids = {"sigmas": sigmas.tolist(), "sigmas_net": sigmas_net.tolist()}
        save_json(path, {"method": "ld3", **about, **grids})


def load_schedule(path, example, hint=""):
    """sigmas, sigmas_net of a schedule.json, float64, as many as in the grid `example`.

    Raises UsageError if it is none, or if its length or ends are not those of `example`.
    """
    names, what = ("sigmas", "sigmas_net"), "a schedule.json of ld3.py"
    sigmas, sigmas_net = read_numbers(path, "schedule", what, names)
    check_grid(sigmas, f"--schedule {path}")
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
