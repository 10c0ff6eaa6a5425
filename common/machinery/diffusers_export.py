"""A time grid that LD3 learned as a scheduler of diffusers: `python ld3.py ... --export FOLDER`."""
import json
from pathlib import Path

import torch

from common.machinery.diffusers_teachers import is_diffusers
from common.machinery.files import atomic_write, save_json
from common.machinery.options import require
from common.machinery.ranks import rank_and_world

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


def check_export(config):
    """UsageError if --export cannot be met: found before any work."""
    folder = config.export
    if folder is None:
        return
    (start, start_net), *_ = config.starts.values()
    coupled = config.times == "coupled" if config.steps else torch.equal(start, start_net)
    of_diffusers = config.teacher is not None and is_diffusers(config.teacher)
    for good, right in (
        (of_diffusers, "--teacher must be a model of diffusers"),
        (config.solver in SCHEDULERS, f"diffusers has {', '.join(SCHEDULERS)} for it"),
        (coupled, "diffusers has coupled times only: learn with --times coupled"),
        (config.steps or config.schedule, "--steps 0 has no grid without --schedule"),
        (config.solver != "dpmpp" or config.order < 3 or config.n < 15,
         "from 15 steps on, diffusers' order 3 ends in another way; take --order 2"),
    ):
        require(good, "export", folder, right)


def export_grid(config, teacher, sigmas, sigmas_net):
    """Write scheduler_config.json, grid.json and ld3_scheduler.py into --export (rank 0).

    Timesteps are fractional. diffusers' z is x / sqrt(1 + sigma^2): its first noise has the
    standard deviation init_noise_sigma, which is next to 1. As diffusers' own schedulers, and
    unless the model's has final_sigmas_type "sigma_min", the last step removes all noise.
    """
    if config.export is None or rank_and_world()[0] > 0:
        return
    import diffusers

    folder, name = Path(config.export), SCHEDULERS[config.solver]
    options = {"solver_type": config.variant} if config.solver == "unipc" else {}
    own = teacher.scheduler.config
    scheduler = getattr(diffusers, name).from_config(  # "zero": the last step has order 1
        own, solver_order=config.order, final_sigmas_type="zero", **options
    )
    if own.get("final_sigmas_type", "zero") == "zero":
        sigmas = torch.cat([sigmas[:-1], torch.tensor([ALMOST_ZERO])])
    timesteps = teacher.timestep(sigmas[:-1].to(teacher.log_sigmas.device))
    grid = {
        "scheduler": name,
        "init_noise_sigma": (1 + sigmas[0].item() ** -2) ** -0.5,
        "sigmas": sigmas.tolist(),
        "timesteps": timesteps.tolist(),
    }
    save_json(folder / "scheduler_config.json", json.loads(scheduler.to_json_string()))
    save_json(folder / "grid.json", grid)
    atomic_write(folder / "ld3_scheduler.py", lambda file: file.write(LOADER.encode()))
