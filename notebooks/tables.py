"""Write the tables of README.md and RESULTS.md from the files in notebooks/results:

    python notebooks/tables.py

A table stands between `<!-- NAME -->` and `<!-- end -->`; TABLES says what makes it. A test fails
where text and files differ.
"""
import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TEXTS = [HERE.parent / name for name in ("README.md", "RESULTS.md")]
sys.path[:0] = [str(HERE.parent), str(HERE)]

from common.diffusion import GRIDS  # noqa: E402
from common.machinery.run import METRICS, table  # noqa: E402
import losses  # noqa: E402
from compare import COUNTS, collect, markdown as compared  # noqa: E402
from grid_table import best_by_count  # noqa: E402


def read(pattern):
    """The metrics.json of all runs whose folder's name fits, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}/*.json"))]


def values(runs, name, nfe, column):
    """One column of the row (name, nfe), of each run that has it."""
    return [
        row[column]
        for run in runs
        for row in run["results"]
        if (row["name"], row["nfe"]) == (name, nfe) and column in row
    ]


def number(x):
    return f"{x:.3f}" if x < 1 else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def cell(found):
    """"0.123", "0.123 ± 0.004" over seeds, or "not run"."""
    if not found:
        return "not run"
    mean = number(statistics.mean(found))
    return f"{mean} ± {number(statistics.stdev(found))}" if len(found) > 1 else mean


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def both(runs, name, nfe):
    """FID in the features of the evaluator's classifier / of the unseen one, if there is one."""
    pair = [values(runs, name, nfe, column) for column in ("fid", "fid_unseen")]
    return " / ".join(map(cell, filter(None, pair))) if pair[0] else "not run"


# ------------------------------------------------------------------------------ the tables


def teacher(dataset):
    quality, = read(f"{dataset}-teacher") or [{"results": []}]
    heads = {"fid": "FID\\*", "fid_unseen": "unseen", "fd": "fd [lite0]"}
    heads |= {"kid": "KID\\*", "kid_fd": "KID [lite0]"}
    measured = {key for row in quality["results"] for key in row}
    shares = [key for key in ("precision", "recall", "confident", "own_class") if key in measured]
    heads = {key: head for key, head in heads.items() if key in measured}
    rows = []
    for row in quality["results"]:
        cells = [_with_error(row, key) for key in heads]
        rows.append([row["name"], row["fid_n"], *cells, *(f"{row[key]:.3f}" for key in shares)])
    head = ["", "n", *heads.values(), *(share.replace("_", " ") for share in shares)]
    return markdown(head, rows)


def _with_error(row, key):
    """A FID, or a KID and its standard error."""
    if not key.startswith("kid"):
        return number(row[key])
    return f"{row[key]:.4f} ± {row[key + '_se']:.4f}"


def ld3_row(label, runs, nfe):
    cells = [label, nfe, len(runs)]
    for column in ("rmse_to_teacher", "fid"):
        grids = {name: values(runs, name, nfe, column)[0] for name in GRIDS}
        best = min(grids, key=grids.get)
        learned = values(runs, "ld3", nfe, column)
        cells += [f"{number(grids[best])} ({best})", cell(learned)]
        if column == "rmse_to_teacher":
            cells.append(f"{statistics.mean(learned) / grids[best]:.2f}")
    return cells


LD3_DEFAULTS = {"start": "auto", "objective": "hard", "times": "decoupled", "distance": "l2"}


def ld3(dataset):
    head = ["", "NFE", "seeds", "RMSE: best hand-made", "LD3", "ratio"]
    head += ["FID\\*: best hand-made", "LD3"]
    groups = {}
    runs = read(f"{dataset}-ld3-*") + read(f"{dataset}-compare/ld3-*")
    for run in (run for run in runs if "optimizer" in run["config"]):
        options = run["config"]
        label = options["solver"]
        if options["optimizer"] == "rmsprop":
            label += f", official recipe from {options['start']}"
        else:
            changed = [options[key] for key in LD3_DEFAULTS]
            defaults = LD3_DEFAULTS.values()
            label = ", ".join([label, *(c for c, usual in zip(changed, defaults) if c != usual)])
        groups.setdefault((label, options["nfe"]), {}).setdefault(run["seed"], run)
    rows = [ld3_row(label, [*runs.values()], nfe) for (label, nfe), runs in sorted(groups.items())]
    return markdown(head, rows)


def grids(dataset):
    """Of each hand-made grid at each count the solver with the lowest FID: FID (RMSE), solver."""
    table, = read(f"{dataset}-grids") or [{"results": []}]
    cells = {}
    for row in table["results"]:
        if "grid" in row:
            known = cells.setdefault((row["grid"], row["nfe"]), row)
            if row["fid"] < known["fid"]:
                cells[row["grid"], row["nfe"]] = row
    counts = sorted({nfe for _, nfe in cells if nfe > 1})  # with 1 all are the same
    lines = []
    for grid in GRIDS:
        line = [grid]
        for nfe in counts:
            row = cells.get((grid, nfe))
            if row is None:
                line.append("not run")
                continue
            text = f"{number(row['fid'])} ({row['rmse_to_teacher']:.3f}), {row['name'].split(',')[0]}"
            best = min(row["fid"] for (_, n), row in cells.items() if n == nfe)
            line.append(f"**{text}**" if row["fid"] == best else text)
        lines.append(line)
    return markdown(["network evaluations", *counts], lines)


def dode(dataset):
    """Solvers, plain and distilled, on each grid; then what needs no fit, in the same runs."""
    head = ["solver", "grid", "NFE", "n", "seeds", "RMSE", "distilled", "ratio"]
    head += ["FID\\*", "distilled"]
    groups, free = {}, {}
    for run in read(f"{dataset}-compare/dode") + read(f"{dataset}-dode*"):
        grids = {}  # a run of several grids says each row's
        for row in run["results"]:
            grids[row["name"], row["nfe"]] = row.get("grid", run["config"]["grid"])
        n = run["config"]["eval_n"]
        for (name, nfe), grid in grids.items():
            if name.startswith("d-"):
                groups.setdefault((nfe, n, name[2:], grid), []).append(run)
            elif name == "ab2":
                free.setdefault((nfe, n, name, grids["ddim", nfe]), []).append(run)
            elif name.startswith("untrained"):
                free.setdefault((nfe, n, name, ""), []).append(run)
    lines = []
    for (nfe, n, solver, grid), runs in sorted([*groups.items(), *free.items()], key=_by_nfe):
        cells = [solver, grid, nfe, n, len(runs)]
        for column in ("rmse_to_teacher", "fid"):
            plain = values(runs, solver, nfe, column)
            distilled = values(runs, f"d-{solver}", nfe, column)
            cells += [number(plain[0]), cell(distilled) if distilled else ""]
            if column == "rmse_to_teacher":
                ratio = f"{statistics.mean(distilled) / plain[0]:.2f}" if distilled else ""
                cells.append(ratio)
        lines.append(cells)
    return markdown(head, lines)


def _by_nfe(group):
    return group[0][:2]


def untrained(dataset):
    """{NFE: the row of the lowest FID} of what costs nothing."""
    return best_by_count((read(f"{dataset}-grids") or [{"results": []}])[0]["results"])


def with_its_name(row):
    """"0.323 (unipc3/cosine)" of a row of what costs nothing."""
    return f"{number(row['fid'])} ({row['name'].replace(', ', '/')})"


def pd_cfd(dataset, *longer):
    """FID of few steps; `longer`: the updates per stage of further runs of PD."""
    pd, cfd = [
        [run for folder in ("compare/{}", "{}", "{}-seed*")
         for run in read(f"{dataset}-{folder.format(name)}")]
        for name in ("progressive", "cfd")
    ]
    head = ["steps", "DDIM, cosine", "untrained", "PD", "CFD"]
    columns = [(pd[:1], "ddim"), (pd, "pd"), (cfd, "cfd")]
    free = untrained(dataset)
    for updates in longer:
        head.insert(-1, f"PD, {updates} updates")
        columns.insert(-1, (read(f"{dataset}-progressive-{updates}"), "pd"))
    rows = []
    for nfe in (8, 4, 2, 1):
        cells = [both(runs, name, nfe) for runs, name in columns]
        if nfe == 8:
            cells[-1] = "(starts here)"
        cells.insert(1, with_its_name(free[nfe]) if nfe in free else "not run")
        rows.append([nfe, *(c if c != "not run" else "" for c in cells)])
    best = both(pd[:1], "teacher", 35)
    rows.append(["35 (teacher)", best, *[""] * (len(head) - 2)])
    if not cfd:
        head, rows = head[:-1], [row[:-1] for row in rows]
    return markdown(head, rows)


def cud(dataset):
    """Shorter trainings first."""
    counts = (1, 2, 4, 8, 16)
    names = {
        "rectified flow": "rectified-flow",
        "rectified flow, equal compute": "rectified-flow-equal-compute",
        "CUD": "cud",
        "CUD's one-step student": "cud-1step",
    }
    groups = {}
    for run in read(f"{dataset}-cud*"):
        groups.setdefault(run["config"]["steps"], []).append(run)
    rows = []
    for steps, runs in sorted(groups.items()) or [(0, [])]:
        for label, name in names.items():
            of_one = name == "cud-1step"
            cells = [both(runs, name, n) for n in (counts[:1] if of_one else counts)]
            cells += [""] * (len(counts) - len(cells))
            if len(groups) < 2:
                rows.append([label, *cells])
            elif cells[0] != "not run":
                rows.append([f"{label} ({steps:,})", *cells])
    return markdown(["evaluations", *counts], rows)


def flow_samplers(dataset):
    """FID of each flow by Euler in equal steps of t, and by the best sampler that all seeds have."""
    runs, rows = read(f"{dataset}-flow-samplers"), []
    for flow in ("rectified-flow", "rectified-flow-equal-compute", "cud"):
        euler, best = [], []
        for nfe in (2, 4, 8):
            names = {row["name"] for run in runs for row in run["results"]}
            found = {n: values(runs, n, nfe, "fid") for n in names if n.split(" ")[0] == flow}
            found = {name: fids for name, fids in found.items() if len(fids) == len(runs)}
            euler.append(cell(found[flow]))
            name = min(found, key=lambda name: statistics.mean(found[name]))
            best.append(f"{cell(found[name])} {name.removeprefix(flow).strip() or '(euler, even)'}")
        rows += [[flow, "Euler, even", *euler], ["", "its best", *best]]
    return markdown(["", "sampler", 2, 4, 8], rows)


def gdd(dataset):
    """What needs no training, of the first run; then the generators of all."""
    runs = read(f"{dataset}-compare/distributional") + read(f"{dataset}-gdd*")
    names = [(row["name"], row["nfe"]) for row in runs[0]["results"]] if runs else []
    # Files without a row "untrained" are older: their DDIM is on the EDM grid, and their
    # discriminator saw the fakes of the generator's own step once more.
    old = {id(run) for run in runs if not any("untrained" in r["name"] for r in run["results"])}
    rows = []
    for name, nfe in [n for n in names if "gdd" not in n[0]] + [("gdd", 1), ("gdd-i", 1)]:
        found = [run for run in runs if values([run], name, nfe, "fid")]
        found = found if "gdd" in name else runs[:1]
        label = name
        if found and id(found[0]) in old and name != "teacher":
            label += ", EDM grid" if name == "ddim" else ", old fakes"
        shares = [cell(values(found, name, nfe, key)) for key in ("precision", "recall")]
        rows.append([label, nfe, both(found, name, nfe), *shares])
    return markdown(["", "evaluations", "FID\\* / unseen", "precision", "recall"], rows)


def six(dataset, seed):
    """All six methods at COUNTS, as notebooks/compare.py shows them, of runs of one seed."""
    folders = {"distributional": "gdd", "dode": "dode-counts"}
    folders |= {name: name for name in ("progressive", "cfd", "cud")}
    folders |= {f"ld3-{nfe}": f"ld3-unipc-nfe{nfe}-seed{seed}" for nfe in COUNTS[1:]}
    runs = {name: read(f"{dataset}-{folder}") for name, folder in folders.items()}
    return compared(collect({name: found[0] for name, found in runs.items() if found})).strip()


def composing_runs():
    """{methods: {(variant, NFE): the rows of its seeds}} of notebooks/composing.py."""
    groups, newer = {}, measured_since()
    for file in read("digits-composing"):
        for row in file["results"]:
            methods, solver = row["methods"], row["variant"].split(",")[0]
            if newer.get(methods) and (methods == "" or solver in ("unipc", "d-ddim")):
                continue
            variants = groups.setdefault(methods, {})
            variants.setdefault((row["variant"], row["nfe"]), []).append(row)
    for methods, variants in newer.items():
        groups[methods] = groups.get(methods, {}) | variants
    return groups


def measured_since():
    """Rows as above of newer files, beside those of the same method: FID alone.

    What costs nothing, LD3 from the best hand-made grid, and D-ODE on the best grid.
    """
    found = {"": {}, "ld3": {}, "d-ode": {}}
    for nfe, row in untrained("digits").items():
        found[""]["untrained", nfe] = [{"fid": row["fid"]}]
    of_ld3 = read("digits-ld3-unipc-nfe*-seed*") + read("digits-compare/ld3-*")
    for methods, name, variant, runs in (
        ("ld3", "ld3", "unipc, best start", of_ld3),
        ("d-ode", "d-ddim", "d-ddim, best grid", read("digits-compare/dode")),
    ):
        for run in runs:
            for row in run["results"]:
                if row["name"] == name:
                    rows = found[methods].setdefault((variant, row["nfe"]), [])
                    rows.append({"fid": row["fid"]})
    return found


def mean_of(rows, column="fid"):
    found = [row[column] for row in rows if column in row]
    return statistics.mean(found) if found else None


def best_of(count, nfe):
    """(methods, rows) of the lowest mean FID with `count` methods; None if none was run."""
    found = [
        (methods, rows)
        for methods, variants in composing_runs().items()
        for (_, n), rows in variants.items()
        if n == nfe and len(methods.replace("+", "").split()) == count
    ]
    return min(found, key=lambda pair: mean_of(pair[1]), default=None)


COMPOSED_NFE = (1, 2, 3, 4, 6, 8)
METHODS = {
    "": "nothing learned", "ld3": "LD3", "d-ode": "D-ODE", "pd": "PD", "cfd": "CFD", "cud": "CUD",
    "gdd-i": "GDD-I",
}


def methods_name(methods):
    return " + ".join(METHODS[method] for method in methods.split(" + "))


def fid_and_rmse(rows):
    rmse = mean_of(rows, "rmse")
    text = cell([row["fid"] for row in rows])
    return text if rmse is None else f"{text} ({rmse:.3f})"


def composing():
    lines = {}
    for methods, variants in composing_runs().items():
        for (variant, nfe), rows in variants.items():
            label = methods_name(methods)
            if methods in ("ld3", "d-ode", "ld3 + d-ode"):
                label += f", {variant.split(', ')[0].removeprefix('d-').replace('ddim', 'euler')}"
            known = lines.setdefault(label, {}).setdefault(nfe, rows)
            if mean_of(rows) < mean_of(known):
                lines[label][nfe] = rows
    table = []
    for label in sorted(lines, key=lambda label: label.count("+")):
        cells = [fid_and_rmse(lines[label][n]) if n in lines[label] else "" for n in COMPOSED_NFE]
        table.append([label, *cells])
    for count, label in (1, "best of one"), (2, "best of two"):
        best = [best_of(count, nfe) for nfe in COMPOSED_NFE]
        names = [f"{cell([mean_of(b[1])])}, {methods_name(b[0])}" if b else "" for b in best]
        table.append([f"**{label}**", *names])
    return markdown(["network evaluations", *COMPOSED_NFE], table)


def readme_ld3():
    """What `python ld3.py` prints."""
    run, = read("digits-ld3-seed0")
    columns = ["name", "nfe", "rmse_to_teacher", *METRICS]
    rows = table(run["results"], columns, run.get("references"))
    return "\n".join(f"    {line}".rstrip() for line in rows.splitlines())


SIX = [  # file, notebook, arXiv, where its loss stands, what is learned, teacher?, network?, series
    ("ld3", 1, "2405.15506", "trainer.py:278", "the time grid", "yes", "no", "LD3 (UniPC-3)"),
    ("dode", 2, "2309.16421", "distilled_sampler.py:4", "a number a step", "yes", "no",
     "D-ODE (DDIM)"),
    ("progressive", 3, "2202.00512", "Eq. 2, Alg. 2", "2 steps in 1", "yes", "yes", "PD"),
    ("cfd", 4, "2211.12039", "diffusion.py:256", "PD, in features", "yes", "yes", "CFD"),
    ("cud", 5, "2305.10769", "flows.py:317", "a self-consistent velocity", "no", "yes", "CUD"),
    ("distributional", 6, "2405.20750", "loss.py:238", "a generator", "yes", "yes", "GDD-I"),
]


def readme_methods():
    """One line a method: FID and cost are those of notebooks/results/digits-compare."""
    compared = json.loads((RESULTS / "digits-compare" / "compare.json").read_text())["results"]
    fids = {(row["label"], row["nfe"]): row["fid"] for row in compared}
    head = ["file", "paper: its loss", "learns", "teacher?", "network?", "cost"]
    head += [f"NFE {n}" for n in COUNTS]
    rows = []
    for name, place, arxiv, loss, learns, teacher, network, label in SIX:
        notebook, = HERE.glob(f"{place}_*.ipynb")
        file = f"[{name}.py]({name}.py) ([notebook](notebooks/{notebook.name}))"
        loss = f"[{arxiv}](https://arxiv.org/abs/{arxiv}): {loss}"
        costs = [row["cost"] for row in compared if row["label"] == label]
        cost = f"{min(costs) / 1000:,.0f} k" + f" to {max(costs) / 1000:,.0f} k" * (
            max(costs) > min(costs)
        )
        cells = [number(fids[label, n]) if (label, n) in fids else "" for n in COUNTS]
        rows.append([file, loss, learns, teacher, network, cost, *cells])
    baseline = "DDIM, cosine grid"
    rows.append(["(DDIM)", *[""] * 5, *(number(fids[baseline, n]) for n in COUNTS)])
    free = untrained("digits")
    cells = [with_its_name(free[n]) for n in COUNTS]
    rows.append(["**untrained**", *[""] * 5, *cells])
    return markdown(head, rows)


def bench():
    """The ratios of `python tests/bench.py > notebooks/results/bench-cpu/bench.txt`."""
    number = r" +(\d+\.\d+)"
    title, rows = "", []
    for line in (RESULTS / "bench-cpu" / "bench.txt").read_text().splitlines():
        if found := re.match(r"(\S.*?) +min +median +max", line):
            title = found[1]
        elif found := re.match(rf"  (\S.*?){3 * number} *(.*)", line):
            name, low, middle, high, limit = found.groups()
            rows.append([f"{title}: {name}" if title else name, middle, f"{low} to {high}", limit])
            title = ""
    return markdown(["", "median", "range", "limit"], rows)


def loss_curves():
    """The picture of each method's kept log.jsonl, and what the quantities in it mean."""
    rows = []
    for method, quantities in losses.MEANING.items():
        runs = [path.parent.name for path in sorted(RESULTS.glob(f"*-{method}-*/losses.png"))]
        links = [f"[{run}](notebooks/results/{run}/losses.png)" for run in runs]
        for name, meaning in quantities.items():
            rows.append([method, name, meaning, ", ".join(links) or "no log is kept"])
    return markdown(["", "quantity", "what it is, and what it should do", "picture"], rows)


TABLES = {
    "readme_ld3": readme_ld3,
    "readme_methods": readme_methods,
    "digits_ld3": partial(ld3, "digits"),
    "digits_grids": partial(grids, "digits"),
    "mnist_grids": partial(grids, "mnist"),
    "digits_dode": partial(dode, "digits"),
    "digits_pd_cfd": partial(pd_cfd, "digits"),
    "digits_cud": partial(cud, "digits"),
    "digits_flow_samplers": partial(flow_samplers, "digits"),
    "digits_gdd": partial(gdd, "digits"),
    "mnist_teacher": partial(teacher, "mnist"),
    "mnist_ld3": partial(ld3, "mnist"),
    "mnist_dode": partial(dode, "mnist"),
    "mnist_pd_cfd": partial(pd_cfd, "mnist", 300, 500),
    "mnist_cud": partial(cud, "mnist"),
    "mnist_gdd": partial(gdd, "mnist"),
    "cifar10_six": partial(six, "cifar10", 21),
    "cifar10_teacher": partial(teacher, "cifar10"),
    "cifar10_grids": partial(grids, "cifar10"),
    "cifar10_ld3": partial(ld3, "cifar10"),
    "cifar10_dode": partial(dode, "cifar10"),
    "cifar10_pd_cfd": partial(pd_cfd, "cifar10"),
    "cifar10_cud": partial(cud, "cifar10"),
    "cifar10_gdd": partial(gdd, "cifar10"),
    "composing": composing,
    "loss_curves": loss_curves,
    "bench": bench,
}


def fill(text):
    """A text with every table that it has a place for made anew. KeyError: an unknown table."""
    parts = re.split(r"(<!-- \w+ -->\n)(.*?)(<!-- end -->)", text, flags=re.S)
    for i in range(1, len(parts), 4):
        name = parts[i].split()[1]
        parts[i + 1] = f"\n{TABLES[name]()}\n\n"
    return "".join(parts)


if __name__ == "__main__":
    for path in TEXTS:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
