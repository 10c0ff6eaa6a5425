"""Write the tables of RESULTS.md from the files in notebooks/results: python notebooks/tables.py

A table stands between `<!-- NAME -->` and `<!-- end -->`; the function NAME here makes it. A test
fails where text and files differ.
"""
import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TEXT = HERE.parent / "RESULTS.md"


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
    """FID in the features of the evaluator's classifier / of the unseen one."""
    pair = [values(runs, name, nfe, column) for column in ("fid", "fid_unseen")]
    return " / ".join(map(cell, pair)) if pair[0] else "not run"


# ------------------------------------------------------------------------------ the tables


def mnist_teacher():
    quality, = read("mnist-teacher") or [{"results": []}]
    rows = []
    for row in quality["results"]:
        fids = [number(value) for key, value in row.items() if key.startswith("fid ")]
        shares = [f"{row[key]:.3f}" for key in ("precision", "recall", "confident")]
        rows.append([row["name"], row["n"], *fids, *shares])
    head = ["", "n", "FID\\*", "unseen", "precision", "recall", "confident"]
    return markdown(head, rows)


HAND_MADE = ("uniform", "quadratic", "logsnr", "edm")


def ld3_row(label, runs, nfe):
    cells = [label, nfe, len(runs)]
    for column in ("rmse_to_teacher", "fid"):
        grids = {name: values(runs, name, nfe, column)[0] for name in HAND_MADE}
        best = min(grids, key=grids.get)
        learned = values(runs, "ld3", nfe, column)
        cells += [f"{number(grids[best])} ({best})", cell(learned)]
        if column == "rmse_to_teacher":
            cells.append(f"{statistics.mean(learned) / grids[best]:.2f}")
    return cells


def mnist_ld3():
    head = ["", "NFE", "seeds", "RMSE: best hand-made", "LD3", "ratio"]
    head += ["FID\\*: best hand-made", "LD3"]
    groups = {}
    for run in read("mnist-ld3-*"):
        options = run["config"]
        changed = [options[key] for key in ("objective", "times", "distance")]
        usual = ["soft", "decoupled", "l2"]
        label = ", ".join([options["solver"], *(c for c, u in zip(changed, usual) if c != u)])
        groups.setdefault((label, options["nfe"]), []).append(run)
    return markdown(head, [ld3_row(label, runs, nfe) for (label, nfe), runs in groups.items()])


def mnist_dode():
    head = ["solver", "NFE", "seeds", "RMSE", "distilled", "ratio", "FID\\*", "distilled"]
    groups = {}
    for run in read("mnist-dode-*"):
        for nfe in run["config"]["nfe"]:
            for solver in run["config"]["solver"]:
                groups.setdefault((nfe, solver), []).append(run)
    rows = []
    for (nfe, solver), runs in sorted(groups.items(), key=lambda group: group[0][0]):
        cells = [solver, nfe, len(runs)]
        for column in ("rmse_to_teacher", "fid"):
            plain = values(runs, solver, nfe, column)
            distilled = values(runs, f"d-{solver}", nfe, column)
            cells += [number(plain[0]), cell(distilled)]
            if column == "rmse_to_teacher":
                cells.append(f"{statistics.mean(distilled) / plain[0]:.2f}")
        rows.append(cells)
    return markdown(head, rows)


def mnist_pd_cfd():
    pd, longer, cfd = (read(f"mnist-{run}") for run in ("progressive", "progressive-300", "cfd"))
    head = ["steps", "DDIM, cosine", "DDIM, EDM grid", "PD", "PD, 300 updates", "CFD"]
    columns = [(pd, "ddim"), (pd, "ddim-edm"), (pd, "pd"), (longer, "pd"), (cfd, "cfd")]
    rows = []
    for nfe in (8, 4, 2, 1):
        rows.append([nfe, *(both(runs, name, nfe) for runs, name in columns)])
    rows[0][-2:] = "", "(starts here)"
    rows[2][-2] = rows[3][-2] = ""  # that run ends with 4 steps
    rows.append(["35 (teacher)", both(pd, "teacher", 35), *[""] * 4])
    return markdown(head, rows)


def mnist_cud():
    runs = read("mnist-cud*")
    counts = (1, 2, 4, 8, 16)
    names = {
        "rectified flow": "rectified-flow",
        "rectified flow, equal compute": "rectified-flow-equal-compute",
        "CUD": "cud",
    }
    rows = [[label, *(both(runs, name, n) for n in counts)] for label, name in names.items()]
    rows.append(["CUD's one-step student", both(runs, "cud-1step", 1), "", "", "", ""])
    return markdown(["evaluations", *counts], rows)


def mnist_gdd():
    runs = read("mnist-gdd*")
    rows = []
    for name, nfe in [
        ("ddim", 1), ("ddim", 5), ("ddim", 10), ("gdd", 1), ("gdd-i", 1), ("teacher", 35)
    ]:
        found = runs[:1] if name in ("ddim", "teacher") else runs  # the same in every run
        shares = [cell(values(found, name, nfe, key)) for key in ("precision", "recall")]
        rows.append([name, nfe, both(found, name, nfe), *shares])
    return markdown(["", "evaluations", "FID\\* / unseen", "precision", "recall"], rows)


def composing_runs():
    """{methods: {(variant, NFE): the rows of its seeds}} of notebooks/composing.py."""
    groups = {}
    for file in read("digits-composing"):
        for row in file["results"]:
            variants = groups.setdefault(row["methods"], {})
            variants.setdefault((row["variant"], row["nfe"]), []).append(row)
    return groups


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


TABLES = (mnist_teacher, mnist_ld3, mnist_dode, mnist_pd_cfd, mnist_cud, mnist_gdd, composing)


def fill(text):
    """RESULTS.md with every table made anew. Raises ValueError where one has no place."""
    for make in TABLES:
        mark = f"<!-- {make.__name__} -->\n"
        before, found, rest = text.partition(mark)
        _, end, after = rest.partition("<!-- end -->")
        if not found or not end:
            raise ValueError(f"RESULTS.md has no place {mark.strip()} ... <!-- end -->")
        text = f"{before}{mark}\n{make()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    TEXT.write_text(fill(TEXT.read_text(encoding="utf-8")), encoding="utf-8")
