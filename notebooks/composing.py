"""Do few-step methods compose? FID on digits: the best of one method beside the best of two.

    python notebooks/composing.py            # runs what --out lacks (an hour on one CPU core)
    python notebooks/composing.py --collect  # runs nothing: the table's file and its picture

Every run is a command below. What trains a network is started as it stands. Of ld3.py and dode.py
the functions are called, with the command's options, and only what they learned is measured:
on N images of the same noise, RMSE to the shipped teacher's (Heun, 35 evaluations), whatever
network the run itself took as its teacher.
"""
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch
from matplotlib.figure import Figure

import dode
import ld3
import tables
from common.diffusion import GRIDS, noise_from_seeds, sigma_grid
from common.fid import make_evaluator, measure
from common.machinery.files import save_json
from common.machinery.options import cli, option, parse_config
from common.machinery.plots import COLORS
from common.machinery.run import Run
from common.machinery.schedule import save_schedule
from common.solvers import SOLVERS, heun
from common.teacher import load_teacher

N = 1024
RESULTS = HERE / "results" / "digits-composing"


@dataclass
class Config:
    out: str = option("runs/composing", "a folder for each run; several may work in one --out")
    collect: bool = option(False, "run nothing")


# ------------------------------------------------------------------------------ the list of runs


@dataclass
class Job:
    methods: str  # what is composed: "ld3", "pd + ld3"
    variant: str  # student and grid, where there are several
    folder: str
    command: str  # without --out; OUT: the folder of all runs


def networks():
    """What trains a network: from the shipped teacher, and from another method's."""
    return [
        Job("pd", "", "pd", "progressive.py"),
        Job("cfd", "", "cfd", "cfd.py --pd OUT/pd"),
        Job("cud", "", "cud", f"cud.py --baseline --eval-n {N}"),
        Job("gdd-i", "", "gdd-i", f"distributional.py --eval-n {N}"),
    ], [
        Job(
            "pd + gdd-i", "", "pd+gdd-i",
            f"distributional.py --teacher OUT/pd/student-1.safetensors --nfe 1 --eval-n {N}",
        ),
        Job("cud + pd", "", "cud+pd", "progressive.py --teacher OUT/cud/velocity.safetensors"),
    ]


def on_teacher(nfe, seed):
    """D-ODE, LD3 and, where its times are coupled, D-ODE on its grid."""
    about = f"--nfe {nfe} --seed {seed}"
    name = f"d-ode-nfe{nfe}-seed{seed}"
    jobs = [Job("d-ode", "best grid", name, f"dode.py --solver ddim ipndm {about}")]
    for solver in ("ipndm", "euler", "unipc"):
        name = f"ld3-{solver}-nfe{nfe}-seed{seed}"
        if solver == "unipc":  # all as by default
            jobs.append(Job("ld3", "", name, f"ld3.py {about}"))
        else:
            command = f"ld3.py --solver {solver} --times coupled {about}"
            jobs.append(Job("ld3", "", name, command))
            command = f"dode.py --solver {solver.replace('euler', 'ddim')} {about}"
            command += f" --schedule OUT/{name}/schedule.json"
            jobs.append(Job("ld3 + d-ode", "", f"{name}+d-ode", command))
    return jobs


def scalars_on_networks(seed):
    """D-ODE on students with as many steps, on their own grid, and on CUD's velocity."""
    jobs = []
    for method, steps in ("pd", 2), ("cfd", 2), ("pd", 4), ("cfd", 4), ("pd", 8):
        teacher = f"--teacher OUT/{method}/student-{steps}.safetensors"
        command = f"dode.py {teacher} --solver ddim --grid cosine --nfe {steps} --seed {seed}"
        about = f"{method} + d-ode", f"{steps}-step student", f"{method}{steps}+d-ode-seed{seed}"
        jobs.append(Job(*about, command))
    for nfe in (2, 3, 4) if seed == 0 else ():
        command = "dode.py --teacher OUT/cud/velocity.safetensors --solver ddim ipndm --grid logsnr"
        jobs.append(Job("cud + d-ode", "logsnr", f"cud+d-ode-nfe{nfe}", f"{command} --nfe {nfe}"))
    return jobs


def grids_on_networks(nfe):
    """LD3 on students, which are made for Euler's steps, and on CUD's velocity."""
    jobs = []
    students = [("pd", 2, 2), ("cfd", 2, 2), ("pd", 4, 3), ("cfd", 4, 3), ("pd", 8, 4)]
    for method, steps, right_nfe in students:
        if right_nfe == nfe:
            teacher = f"--teacher OUT/{method}/student-{steps}.safetensors"
            about = f"{method} + ld3", f"{steps}-step student", f"{method}{steps}+ld3-nfe{nfe}"
            jobs.append(Job(*about, f"ld3.py {teacher} --solver euler --nfe {nfe}"))
    if nfe <= 4:
        command = f"ld3.py --teacher OUT/cud/velocity.safetensors --solver ipndm --nfe {nfe}"
        jobs.append(Job("cud + ld3", "", f"cud+ld3-nfe{nfe}", command))
    return jobs


def all_jobs():
    """In the order of running: cheap ones first, and nothing before what it needs."""
    from_teacher, from_others = networks()
    command = "dode.py --solver ddim --grid edm --nfe 1 2 4 8"
    jobs = [*from_teacher, Job("d-ode", "edm", "d-ode-edm-seed0", command)]
    jobs += scalars_on_networks(0) + scalars_on_networks(1) + scalars_on_networks(2)
    for nfe in (2, 3, 4, 6, 8):
        jobs += grids_on_networks(nfe) + on_teacher(nfe, 0)
    jobs += from_others[:1]
    for nfe in (2, 3, 4, 6, 8):
        jobs += on_teacher(nfe, 1) + on_teacher(nfe, 2)
    return jobs + from_others[1:]


# ------------------------------------------------------------------------------------ running


@torch.no_grad()
def teacher_images(out):
    """The shipped teacher's N images, float32 (N, 1, 8, 8), kept in --out."""
    path = out / "teacher-images.pt"
    if not path.exists():
        teacher = load_teacher(None, "digits", "cpu")
        sigmas = torch.cat([sigma_grid("edm", 17), torch.zeros(1, dtype=torch.float64)])
        parts = torch.arange(N).split(256)
        noises = [80 * noise_from_seeds(part, teacher.net.img_shape) for part in parts]
        torch.save(torch.cat([heun(teacher, x, sigmas).float() for x in noises]), path)
    return torch.load(path, weights_only=True)


def learned_samplers(script, config, run, teacher):
    """{(name, NFE): sampler(noise, labels)} of what ld3.py or dode.py learns."""
    def sampler(solver, *arguments, **options):
        return lambda noise, labels: solver(
            teacher, config.sigma_max * noise, *arguments, **options
        )

    if script is ld3:
        distance = ld3.make_distance(config, run.device)
        sigmas, sigmas_net = ld3.train(config, run, teacher, distance)
        save_schedule(run.out / "schedule.json", sigmas, sigmas_net, nfe=config.nfe)
        solver = partial(SOLVERS[config.solver], order=config.order)
        return {("ld3", config.nfe): sampler(solver, sigmas, sigmas_net=sigmas_net)}
    samplers = {}
    for (solver, nfe), entry in dode.fit(config, run, teacher).items():
        stages = dode.stages_of(solver, entry["sigmas"], nfe)
        samplers[f"d-{solver}", nfe] = sampler(dode.integrate, stages, entry["lambdas"])
        if config.seed == 0 and not (config.schedule or config.teacher):
            samplers[solver, nfe] = sampler(dode.integrate, stages)  # the same for every seed
    return samplers


def run_job(job, out):
    script, *options = shlex.split(job.command.replace("OUT/", f"{out.as_posix()}/"))
    options += ["--out", str(out / job.folder)]
    if script not in ("ld3.py", "dode.py"):
        subprocess.run([sys.executable, str(HERE.parent / script), *options], check=True)
        return
    script = {"ld3.py": ld3, "dode.py": dode}[script]
    config = parse_config(script.Config, script.PRESETS, "", [*options, "--eval-n", str(N)])
    run = Run(script.__name__, config)
    teacher = load_teacher(config.teacher, "digits", run.device)
    samplers = learned_samplers(script, config, run, teacher)
    images = iter(teacher_images(out).to(run.device).split(config.eval_batch))
    samplers["teacher", 35] = lambda noise, labels: next(images)  # batches come in order
    evaluator = make_evaluator(config, run.device, unseen=True)
    run.finish(measure(run, samplers, teacher.net, evaluator, reference="teacher")[0])


# ------------------------------------------------------------------------------------ collecting

def rows_of(job, metrics):
    """Rows of the table from a run's metrics.json: {methods, variant, nfe, fid, ...}."""
    solver = metrics["config"].get("solver")
    for row in metrics["results"]:
        name, methods, variant = row["name"], job.methods, [job.variant]
        if name == "ld3":
            variant.insert(0, solver)
        elif name.startswith("d-"):
            variant.insert(0, name)
        elif methods == "ld3" and name in GRIDS:
            methods, variant = "", [solver, name]
        elif methods == "d-ode" and name in ("ddim", "ipndm", "ab2", "dpmpp2m"):
            methods, variant = "", [name, job.variant]
        elif methods == "pd" and name == "ddim":
            methods, variant = "", [name, "cosine"]
        elif name == "cud-1step":
            variant = ["one-step student"]
        elif name != methods.split(" + ")[-1]:
            continue
        if row["fid_n"] != N:
            continue
        about = {"methods": methods, "variant": ", ".join(filter(None, variant))}
        about |= {"nfe": row["nfe"], "seed": metrics["seed"], "fid": row["fid"]}
        about |= {"fid_unseen": row["fid_unseen"]} if "fid_unseen" in row else {}
        if "rmse_to_teacher" in row and "+ pd" not in methods:  # that is RMSE to CUD's
            about["rmse"] = row["rmse_to_teacher"]
        commit = metrics.get("commit")
        yield {**about, "run": job.folder, "command": job.command, "commit": commit}


def collect(out):
    rows, teacher = [], None
    for job in all_jobs():
        path = out / job.folder / "metrics.json"
        if path.exists():
            metrics = json.loads(path.read_text())
            rows += rows_of(job, metrics)
            if job.folder == "pd":
                teacher = metrics["results"][-1]["fid"]  # Heun, 35 evaluations
    seen = {}  # hand-made solvers stand in several runs
    for row in rows:
        seen.setdefault(tuple(row[k] for k in ("methods", "variant", "nfe", "seed")), row)
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {"fid_n": N, "fid_features": "digits-classifier", "teacher_fid": teacher}
    save_json(RESULTS / "results.json", {**about, "results": list(seen.values())})


def picture(path):
    """FID against NFE: nothing learned, the best of one method, the best of two."""
    file = json.loads((RESULTS / "results.json").read_text())
    figure = Figure(figsize=(8, 4.6), dpi=120)
    axis = figure.subplots()
    lines = ("nothing learned", ":"), ("best of one", "--"), ("best of two", "-")
    for count, (label, style) in enumerate(lines):
        best = {nfe: tables.best_of(count, nfe) for nfe in tables.COMPOSED_NFE}
        points = [(nfe, tables.mean_of(b[1]), b[0]) for nfe, b in best.items() if b]
        axis.plot(*list(zip(*points))[:2], style, color="gray", label=label, zorder=1)
        for nfe, fid, methods in points if count else []:
            inside, *edge = [COLORS[method] for method in methods.split(" + ")]
            look = {"color": inside, "edgecolor": edge or inside, "linewidth": 2.5}
            axis.scatter(nfe, fid, s=80, **look)
            offset = (0, 10 if count == 1 else -19)
            about = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            about["bbox"] = {"color": "white", "pad": 0.5}
            axis.annotate(tables.methods_name(methods), (nfe, fid), offset, **about)
    if file["teacher_fid"]:
        style = {"color": COLORS["teacher"], "linestyle": "-.", "linewidth": 0.8}
        axis.axhline(file["teacher_fid"], label="teacher, 35 evaluations", **style)
    axis.set(xlabel="network evaluations", yscale="log", xticks=tables.COMPOSED_NFE)
    axis.margins(y=0.12)
    axis.set_ylabel(f"FID [{file['fid_features']}, n={file['fid_n']}]")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def main():
    config = parse_config(Config, {}, __doc__)
    out = Path(config.out)
    for job in [] if config.collect else all_jobs():
        if not (out / job.folder / "metrics.json").exists():
            run_job(job, out)
    collect(out)
    picture(RESULTS / "fid.png")


if __name__ == "__main__":
    cli(main)
