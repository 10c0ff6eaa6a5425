"""Six methods, one data set, one teacher: a picture, two plots and a table.

    python notebooks/compare.py                    # digits: half an hour on 2 CPU cores
    python notebooks/compare.py --quick            # short trainings
    python notebooks/compare.py --dataset mnist --methods ld3 dode

Runs the scripts one after the other, each into a folder of its own in --out; what is there
already is only read, and what was stopped goes on. All images are of the noise seeds 0, 1, 2, ...
Leaves samples.png, fid.png, cost.png, table.md and compare.json.
"""
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SCRIPTS = Path(__file__).parent.parent
sys.path.insert(0, str(SCRIPTS))

from common import UsageError  # noqa: E402
from common.diffusion import GRIDS  # noqa: E402
from common.machinery.files import atomic_write, save_json  # noqa: E402
from common.machinery.options import (  # noqa: E402
    DATASETS, MOST_SEED, cli, option, parse_config,
)
from common.machinery.plots import COLORS, blank, picture, save_curves, show  # noqa: E402
from common.machinery.run import name_of_data  # noqa: E402

METHODS = ("ld3", "dode", "progressive", "cfd", "cud", "distributional")
COUNTS = (1, 2, 4, 8)  # network evaluations
QUICK = {
    "ld3": ["--steps", "50"], "dode": [], "progressive": ["--updates", "60"],
    "cfd": ["--updates", "60"], "cud": ["--steps", "300", "--distill-steps", "30"],
    "distributional": ["--images", "20000"],
}
TEACHER = "teacher, Heun"
BASELINES = ("best without training", "DDIM, best grid", "DDIM, cosine grid")
SERIES = {  # what is shown: (run, or "" for the first that has it, name of its rows, colour)
    TEACHER: ("progressive", "teacher", COLORS["teacher"]),
    "best without training": ("", "untrained", "0.4"),  # common.baselines, by FID at each count
    "DDIM, best grid": ("dode", "ddim", "0.75"),
    "DDIM, cosine grid": ("progressive", "ddim", "0.6"),
    "LD3 (UniPC-3)": ("ld3", "ld3", COLORS["ld3"]),
    "D-ODE (DDIM)": ("dode", "d-ddim", COLORS["d-ode"]),
    "PD": ("progressive", "pd", COLORS["pd"]),
    "CFD": ("cfd", "cfd", COLORS["cfd"]),
    "CUD": ("cud", "cud", COLORS["cud"]),
    "CUD, one step": ("cud", "cud-1step", COLORS["cud"]),
    "GDD-I": ("distributional", "gdd-i", COLORS["gdd-i"]),
}
UNTRAINED = ("teacher", "ddim", "untrained")
PICTURE = [label for label in SERIES if label not in (TEACHER, "DDIM, best grid", "CUD, one step")]
BEST = "teacher's best"
PLACES = {  # without a row of their own: row, column, caption
    TEACHER: ("DDIM, cosine grid", BEST, "Heun, 35 evaluations"),
    "CUD, one step": ("CUD", "NFE 1", "one-step student"),
}


@dataclass
class Config:
    dataset: str = option("digits", "data set", choices=DATASETS)
    data_dir: str | None = option(None, "where the data lies (default: the cache)")
    teacher: str | None = option(None, "of all but cud.py (default: the data set's own)")
    methods: tuple[str, ...] = option(METHODS, "which to run", choices=METHODS)
    quick: bool = option(False, "short trainings")
    seed: int = option(0, "of the trainings", high=MOST_SEED)
    eval_n: int | None = option(None, "images for FID (default: digits, mnist 1024)", low=16)
    device: str = option("auto", "auto, cpu, cuda")
    out: str | None = option(None, "folder (default: runs/compare-DATASET, with --quick -quick)")

    def __post_init__(self):
        self.methods = tuple(m for m in METHODS if m in self.methods)
        name = f"runs/compare-{name_of_data(self)}" + "-quick" * self.quick
        self.out = Path(self.out or name)
        if self.eval_n is None and self.dataset in ("digits", "mnist"):
            self.eval_n = 1024  # else what the presets say, which is the same for all


def commands(config):
    """{folder: arguments}, in the order of the runs: cfd needs a student of progressive."""
    shared = ["--dataset", config.dataset, "--seed", config.seed, "--device", config.device]
    for name in ("data_dir", "eval_n"):
        if getattr(config, name) is not None:
            shared += [f"--{name.replace('_', '-')}", getattr(config, name)]
    runs = {}
    for method in config.methods:
        more = shared + QUICK[method] * config.quick
        if config.teacher and method != "cud":
            more += ["--teacher", config.teacher]
        if method == "ld3":  # a grid for every count; with one step there is nothing to learn
            for nfe in COUNTS[1:]:
                runs[f"ld3-{nfe}"] = ["ld3.py", "--nfe", nfe, *more]
            continue
        if method == "dode":
            more += ["--solver", "ddim", "--nfe", *COUNTS]
        if method == "cud":
            more += ["--nfe", *COUNTS]
        runs[method] = [f"{method}.py", *more]
    return {folder: [str(a) for a in arguments] for folder, arguments in runs.items()}


def finished(folder, arguments):
    """The metrics.json of a run by this command, but for its folders; or None."""
    path = folder / "metrics.json"
    if not path.exists():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    command, _, _ = metrics["command"].partition(" --out ")
    return metrics if command == shlex.join(arguments) else None


def run_all(config):
    """Run what is not finished yet; {folder: metrics.json}."""
    found = {}
    for folder, arguments in commands(config).items():
        out = config.out / folder
        found[folder] = finished(out, arguments)
        if found[folder] is None:
            arguments += ["--out", str(out)]
            if folder == "cfd" and "progressive" in found:
                arguments += ["--pd", str(config.out / "progressive")]
            if (out / "checkpoint.pt").exists() and not (out / "metrics.json").exists():
                arguments.append("--resume")  # it was stopped
            print(f"\n$ python {' '.join(arguments)}", flush=True)
            script = arguments[0]
            command = [sys.executable, SCRIPTS / script, *arguments[1:]]
            code = subprocess.run(command).returncode
            if code:
                raise UsageError(f"{script} ended with code {code}; the same command goes on here")
            found[folder] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return found


def collect(runs):
    """[{"label", "nfe", "fid", "cost", "run", ...}], of all series that some run has."""
    rows = {}  # (series, NFE) -> the first row of it
    for label, (method, name, _) in SERIES.items():
        for folder, metrics in runs.items():
            of_it = folder.partition("-")[0] == method or not method
            for row in metrics["results"] if of_it else ():
                if row["name"].partition(" (")[0] == name:  # "untrained (unipc3, cosine)"
                    cost = 0 if name in UNTRAINED else training_cost(metrics, row, runs)
                    found = {**row, "label": label, "run": folder, "cost": cost}
                    rows.setdefault((label, row["nfe"]), found)
    return list(rows.values())


def training_cost(metrics, row, runs):
    """Network evaluations of one image that training took; a backward pass counts as two.

    Without the discriminator's and the classifier's networks. A student has cost all stages
    before it.
    """
    c, nfe = metrics["config"], row["nfe"]
    method = metrics["method"]
    if method == "ld3":
        starts = len(GRIDS) if c["start"] == "auto" and not c["schedule"] else 1
        validations = starts + -(-c["steps"] // c["valid_every"])
        per_image = 4 if c["objective"] == "soft" else 3  # a move of the latent is tried out
        samples = per_image * c["steps"] * c["batch_size"] + validations * c["valid_n"]
        return nfe * samples + c["teacher_nfe"] * (c["train_n"] + c["valid_n"])
    if method == "dode":
        return row["fit_evaluations"]
    if method == "cud":
        passes = 3 * (2 - c["independent"]) + 2 * int(c["rk"][0]) - 1
        cost = c["steps"] * c["batch_size"] * passes
        if row["name"] == "cud-1step":  # its targets, then a pass of the EMA in every step
            cost += 16 * c["distill_n"] + 3 * c["distill_steps"] * c["batch_size"] * 4
        return cost
    if method == "distributional":
        return 4 * (c["images"] // c["batch_size"]) * c["batch_size"]  # with the fakes of L_D
    cost, first = 0, c["from_steps"]
    if c.get("pd"):  # the part of progressive.py's run that comes before
        first = c["cfd_from"]
        cost = training_cost(runs["progressive"], {"nfe": first}, runs)
    stage = first // 2
    while stage >= max(nfe, c["to_steps"]):
        cost += (2 if stage <= 2 else 1) * c["updates"] * c["batch_size"] * 5
        stage //= 2
    return cost


def save_comparison(path, cells, columns, title):
    """A table of images: {row label: {column: (8 images uint8 (n, C, H, W), caption)}}."""
    with picture(path) as figure:
        figure.set_size_inches(1.5 + 1.75 * len(columns), 1.08 * len(cells) + 0.7)
        axes = blank(figure, len(cells), len(columns))
        for line, (label, row) in zip(axes, cells.items()):
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
            for axis, column in zip(line, columns):
                if column in row:
                    images, caption = row[column]
                    show(axis, images[:8], rows=2)
                    axis.set_xlabel(caption, fontsize=8)
        for axis, column in zip(axes[0], columns):
            axis.set_title(column, fontsize=10)
        figure.suptitle(title, fontsize=10)


def draw(out, dataset, space, rows):
    """samples.png, a table of images; fid.png and cost.png: FID against evaluations and cost."""
    cells, best = {label: {} for label in PICTURE}, {}
    by_nfe, by_cost, counts = {}, {}, {}
    for row in rows:
        label, nfe = row["label"], row["nfe"]
        if label == TEACHER:
            best[f"{label}, {nfe} evaluations"] = row["fid"]
        elif nfe in COUNTS:
            counts.setdefault(label, []).append(nfe)
            for curves, x in ((by_nfe, nfe), (by_cost, row["cost"])):
                if x:
                    xs, ys = curves.setdefault(label, ([], []))
                    xs.append(x)
                    ys.append(row["fid"])
        line, column, *caption = PLACES.get(label, (label, f"NFE {nfe}"))
        if line in cells:
            with np.load(out / row["run"] / "samples.npz") as file:
                images = file[f"{row['name']}, NFE {nfe}"]
            metric = "FID" if row["fid_features"] == "inception" else "FID*"
            cells[line][column] = images, ": ".join([*caption, f"{metric} {row['fid']:.3g}"])
    columns = [f"NFE {n}" for n in COUNTS] + [BEST] * any(BEST in row for row in cells.values())
    cells = {label: row for label, row in cells.items() if row}
    save_comparison(out / "samples.png", cells, columns, f"{dataset}: the same noise everywhere")
    look = {"references": best, "baselines": BASELINES, "title": dataset}
    look["colors"] = {label: color for label, (_, _, color) in SERIES.items()}
    save_curves(out / "fid.png", by_nfe, "network evaluations (NFE)", space, log="xy", **look)
    xlabel = "network evaluations in training (a backward pass counts as two)"
    look["title"] += ": training cost; at each point NFE"
    save_curves(out / "cost.png", by_cost, xlabel, space, log="xy", notes=counts, **look)


def markdown(rows):
    """FID by series and count, and what the training cost; the names of what was not trained."""
    head = ["", *(f"NFE {n}" for n in COUNTS), "network evaluations in training"]
    lines = [head, ["---"] * len(head)]
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        fids = {}
        for row in mine:
            _, bracket, solver = row["name"].partition(" (")
            fids[row["nfe"]] = f"{row['fid']:.3g}{bracket}{solver}"
        if label == TEACHER:
            label += f", {mine[0]['nfe']} evaluations: {mine[0]['fid']:.3g}"
        costs = sorted({row["cost"] for row in mine})
        ends = dict.fromkeys([costs[0], costs[-1]])
        cost = " to ".join(f"{cost / 1e3:,.0f} k" for cost in ends) if costs[-1] else ""
        lines.append([label, *(fids.get(n, "") for n in COUNTS), cost])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main():
    config = parse_config(Config, {}, __doc__)
    runs = run_all(config)
    rows, out = collect(runs), config.out
    space = f"FID [{rows[0]['fid_features']}, n={rows[0]['fid_n']}]"
    draw(out, config.dataset, space, rows)
    table = markdown(rows)
    atomic_write(out / "table.md", lambda file: file.write(table.encode()))
    kept = ("command", "commit", "seed", "device", "seconds")
    about = {name: {k: metrics[k] for k in kept} for name, metrics in runs.items()}
    save_json(out / "compare.json", {"dataset": config.dataset, "runs": about, "results": rows})
    print(f"\n{space}\n\n{table}\nin {out}: samples.png, fid.png, cost.png, table.md, compare.json")


if __name__ == "__main__":
    cli(main)
