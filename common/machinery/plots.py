"""The pictures a run leaves behind, as PNG: rows of images, curves, time grids. Rank 0 writes."""
import contextlib
import itertools
import os
import sys

import numpy as np

# A notebook's MPLBACKEND may not be installed here; only pyplot needs it, which is not used.
BACKEND = "matplotlib" not in sys.modules and os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogFormatter  # noqa: E402

from common.machinery.files import atomic_write  # noqa: E402
from common.machinery.foreign import one_line  # noqa: E402
from common.machinery.ranks import rank_and_world  # noqa: E402

if BACKEND:
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = BACKEND

# One colour for a method in every picture (Okabe & Ito); all others are gray, as baselines.
COLORS = {
    "teacher": "black", "ld3": "#0072b2", "d-ode": "#e69f00", "pd": "#009e73", "cfd": "#cc79a7",
    "cud": "#d55e00", "gdd": "#56b4e9", "gdd-i": "#8c6bb1",
}


@contextlib.contextmanager
def picture(path):
    """`with picture(path) as figure:` draws, and writes the figure to `path`.

    In matplotlib's own style, whatever the user's is; a failure costs the picture alone.
    """
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            figure = Figure(dpi=120, layout="constrained")
            yield figure
            how = {"format": "png", "bbox_inches": "tight", "pad_inches": 0.05}
            if rank_and_world()[0] == 0:
                atomic_write(path, lambda file: figure.savefig(file, **how))
    except Exception as error:  # of fonts, of a full disk: the numbers are still to be written
        print(f"{path} could not be drawn ({one_line(error)})")


def show(axis, images, rows=1):
    """uint8 images (n, C, H, W), framed in gray, as `rows` rows of equally many."""
    framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=128)
    n, c, h, w = framed.shape
    tiles = framed.reshape(rows, n // rows, c, h, w).transpose(0, 3, 1, 4, 2)
    pixels = tiles.reshape(rows * h, n // rows * w, c)
    axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def blank(figure, rows, columns):
    """Axes (rows, columns) without ticks and frames."""
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return axes


def save_rows(path, rows, columns=16):
    """One labelled row of images for each of {label: uint8 (n, C, H, W)}: the first `columns`.

    All of them lie beside the picture as an .npz, under their labels.
    """
    rows = {label: np.asarray(images) for label, images in rows.items()}
    with picture(path) as figure:
        if rank_and_world()[0] == 0:
            atomic_write(path.with_suffix(".npz"), lambda file: np.savez_compressed(file, **rows))
        figure.set_size_inches(1.9 + 0.62 * columns, 0.68 * len(rows) + 0.1)
        for axis, (label, images) in zip(blank(figure, len(rows), 1).flat, rows.items()):
            show(axis, images[:columns])
            axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)


def save_curves(
    path, curves, xlabel, ylabel, title="", log="", references=None, colors=None, baselines=(),
    notes=None,
):
    """Lines {label: (xs, ys)} in one plot; `log`, "", "x", "y" or "xy": the logarithmic axes.

    Axis y is linear around 0 and logarithmic beyond 1 with "symlog". references {label: y} are
    lines across the plot. colors {label: color}; the lines of `baselines` are dashed. notes
    {label: a word at each point}.
    """
    with picture(path) as figure:
        figure.set_size_inches(8, 4)
        axis = figure.subplots()
        for label, (xs, ys) in curves.items():
            marker = "D" if len(xs) == 1 else "." if len(xs) < 40 else None
            look = {"color": (colors or {}).get(label), "marker": marker}
            axis.plot(xs, ys, "--" if label in baselines else "-", label=label, **look)
            for x, y, word in zip(xs, ys, (notes or {}).get(label, ())):
                axis.annotate(word, (x, y), (4, 4), textcoords="offset points", fontsize=8)
        for label, y in (references or {}).items():
            axis.axhline(y, color="gray", linestyle="--", label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if log == "symlog":
            axis.set_yscale("symlog", linthresh=1)
        else:
            axis.set_xscale("log" if "x" in log else "linear")
            axis.set_yscale("log" if "y" in log else "linear")
            if "y" in log:  # within a decade: 2, 3, 4 as well
                axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        points = sorted({x for xs, _ in curves.values() for x in xs})
        if len(points) < 13 and all(isinstance(x, int) for x in points):
            axis.set_xticks(points, map(str, points))  # counts: 1, 2, 4 instead of 10^0, ...
            axis.set_xticks([], minor=True)
        if log:
            axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        figure.legend(fontsize=8, loc="outside center right")


def save_fid_curves(path, rows, title=""):
    """FID against network evaluations, one line for each name among `rows` of metrics.json.

    The teacher's best, with many more evaluations, is a line across the plot.
    """
    curves, references = {}, {}
    grays = itertools.cycle(("0.4", "0.6", "0.75", "0.85"))
    for row in rows:
        if row["name"] == "teacher":
            references[f"teacher ({row['nfe']} evaluations)"] = row["fid"]
        else:
            name = row["name"].partition(" (")[0]  # untrained (solver, grid): one curve
            xs, ys = curves.setdefault(name, ([], []))
            xs.append(row["nfe"])
            ys.append(row["fid"])
    colors = {name: COLORS.get(name.removesuffix("-1step")) or next(grays) for name in curves}
    baselines = [name for name, color in colors.items() if color.startswith("0.")]
    ylabel = f"FID [{rows[0]['fid_features']}, n={rows[0]['fid_n']}]"
    save_curves(
        path, curves, "network evaluations", ylabel, title, "xy", references, colors, baselines
    )


def save_sigma_grids(path, grids, title="", floor=1e-3):
    """Time grids {label: (sigmas, sigmas_net or None)} on a log axis; sigmas_net are crosses."""
    with picture(path) as figure:
        figure.set_size_inches(8, 0.5 * len(grids) + 1.3)
        axis = figure.subplots()
        for y, (sigmas, sigmas_net) in enumerate(grids.values()):
            xs = np.maximum(np.asarray(sigmas, dtype=float), floor)
            axis.plot(xs, [y] * len(xs), "o-", color=f"C{y}", markersize=6, linewidth=1)
            if sigmas_net is not None:  # the network is not evaluated at the last level
                xs = np.maximum(np.asarray(sigmas_net, dtype=float), floor)[:-1]
                label = "conditioning noise level"
                axis.plot(xs, [y] * len(xs), "x", color="black", markersize=7, label=label)
                axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
        axis.set(xscale="log", xlabel="sigma (noise level): from noise to image")
        axis.set_title(title, loc="left")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks(range(len(grids)), list(grids))
        axis.invert_xaxis()
        axis.grid(alpha=0.3, axis="x")
