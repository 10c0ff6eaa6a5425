"""A time grid that LD3 learned, as a scheduler of diffusers.

    python ld3.py --teacher MODEL --times coupled --solver unipc --nfe 10 --out runs/ld3-model
    python notebooks/to_diffusers.py --schedule runs/ld3-model/schedule.json --out FOLDER

MODEL is the folder or hub name of a UNet2DModel. FOLDER gets the scheduler's config, the grid and
ld3_scheduler.py, whose `load()` makes the scheduler; its docstring shows how to use it.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common.machinery.diffusers_teachers import is_diffusers, load_diffusers  # noqa: E402
from common.machinery.files import atomic_write, save_json  # noqa: E402
from common.machinery.options import cli, option, parse_config, require  # noqa: E402
from common.machinery.schedule import read_schedule  # noqa: E402

# Euler in sigma is DPM-Solver++ of order 1, whose pipelines need no rescaled input.
SCHEDULERS = {
    "euler": "DPMSolverMultistepScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
ALMOST_ZERO = 1e-8  # a last level that removes all noise; with 0 itself, UniPC's bh1 is inf * 0
LOADER = '''"""The time grid that LD3 learned. With this folder on sys.path:

    pipe = diffusers.DDPMPipeline.from_pretrained(MODEL)
    pipe.scheduler = ld3_scheduler.load()
    images = pipe(batch_size=16).images
"""
import json
from pathlib import Path

import diffusers
import torch

HERE = Path(__file__).parent
GRID = json.loads((HERE / "grid.json").read_text())


class Scheduler(getattr(diffusers, GRID["scheduler"])):
    def set_timesteps(self, *steps, device=None, **options):
        super().set_timesteps(len(GRID["timesteps"]), device=device)  # forget the last images
        self.timesteps = torch.tensor(GRID["timesteps"], device=device)
        self.sigmas = torch.tensor(GRID["sigmas"])
        self.init_noise_sigma = GRID["init_noise_sigma"]
        self.set_begin_index(0)

    def step(self, *arguments, generator=None, **options):  # UniPC's takes none
        return super().step(*arguments, **options)


def load():
    return Scheduler.from_pretrained(HERE)
'''


@dataclass
class Config:
    schedule: str = option("runs/ld3-digits/schedule.json", "the file that a run of ld3.py left")
    out: str = option("ld3_scheduler", "folder for the scheduler")


def exportable(path):
    """What a schedule.json says, and its `sigmas`; UsageError unless diffusers can sample so."""
    about, sigmas, sigmas_net = read_schedule(path)
    teacher, solver = str(about.get("teacher")), about.get("solver")
    late = solver == "dpmpp" and about.get("order") == 3 and len(sigmas) > 15
    for good, message in (
        (is_diffusers(teacher), f"its teacher {teacher} is no model of diffusers"),
        (solver in SCHEDULERS, f"is for {solver}; diffusers has {', '.join(SCHEDULERS)}"),
        (torch.equal(sigmas, sigmas_net),
         "diffusers has coupled times only; learn it with --times coupled"),
        (not late, "from 15 steps on, diffusers' order 3 ends in another way; learn with --order 2"),
    ):
        require(good, "schedule", path, message)
    return about, sigmas


def export_grid(folder, teacher, sigmas, solver, order, variant="bh1"):
    """Write scheduler_config.json, grid.json and ld3_scheduler.py into `folder`.

    Timesteps are fractional. diffusers' z is x / sqrt(1 + sigma^2): its first noise has the
    standard deviation init_noise_sigma, which is next to 1. As diffusers' own schedulers, and
    unless the model's has final_sigmas_type "sigma_min", the last step removes all noise.
    """
    import diffusers

    options = {"solver_type": variant} if solver == "unipc" else {}
    own = teacher.scheduler.config
    scheduler = getattr(diffusers, SCHEDULERS[solver]).from_config(
        own, solver_order=order, final_sigmas_type="zero", **options  # the last step has order 1
    )
    if own.get("final_sigmas_type", "zero") == "zero":
        sigmas = torch.cat([sigmas[:-1], torch.tensor([ALMOST_ZERO])])
    grid = {
        "scheduler": SCHEDULERS[solver],
        "init_noise_sigma": (1 + sigmas[0].item() ** -2) ** -0.5,
        "sigmas": sigmas.tolist(),
        "timesteps": teacher.timestep(sigmas[:-1]).tolist(),
    }
    save_json(folder / "scheduler_config.json", json.loads(scheduler.to_json_string()))
    save_json(folder / "grid.json", grid)
    atomic_write(folder / "ld3_scheduler.py", lambda file: file.write(LOADER.encode()))


def main():
    config = parse_config(Config, {}, __doc__)
    about, sigmas = exportable(config.schedule)
    teacher = load_diffusers(about["teacher"])
    folder = Path(config.out)
    export_grid(folder, teacher, sigmas, about["solver"], about["order"], about["variant"])
    print(f"in {folder}: ld3_scheduler.py makes the scheduler, its first lines show how")


if __name__ == "__main__":
    cli(main)
