"""The pictures a run leaves behind: labelled rows of images, curves, grids of sigmas. Everything is written as PNG."""
import numpy as np
from matplotlib.figure import Figure

from common.training import atomic_write


def _write(figure, path, **how):
    atomic_write(path, lambda file: figure.savefig(file, format="png", **how))


def save_rows(path, rows, columns=16):
    """One labelled row of images per entry of `rows`, {label: uint8 images (n, C, H, W)}; the first `columns` of each are shown."""
    figure = Figure(figsize=(1.9 + 0.62 * columns, 0.68 * len(rows) + 0.1), dpi=120)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows.items()):
        images = np.asarray(images[:columns])
        framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=128)  # (n, C, H+2, W+2)
        strip = np.concatenate(list(framed.transpose(0, 2, 3, 1)), axis=1)  # (H+2, n (W+2), C)
        axis.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.subplots_adjust(left=0.1, right=1, bottom=0, top=1, hspace=0.1)
    _write(figure, path, bbox_inches="tight", pad_inches=0.05)  # as wide as the longest label asks for


def save_curves(path, curves, xlabel, ylabel, title="", log=""):
    """Lines {label: (xs, ys)} in one plot; `log` names the logarithmic axes ('', 'x', 'y' or 'xy')."""
    figure = Figure(figsize=(6.4, 4), dpi=120)
    axis = figure.subplots()
    for label, (xs, ys) in curves.items():
        axis.plot(xs, ys, marker="." if len(xs) < 40 else None, label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale="log" if "x" in log else "linear", yscale="log" if "y" in log else "linear")
    points = sorted({x for xs, _ in curves.values() for x in xs})
    if "x" in log and len(points) < 13 and all(isinstance(x, int) for x in points):  # counts: 1, 2, 4 instead of 10^0, 2 x 10^0, ...
        axis.set_xticks(points, map(str, points))
        axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    _write(figure, path)


def save_sigma_grids(path, grids, title="", floor=1e-3):
    """Noise levels on a log axis, one line per entry of `grids`, {label: (sigmas, sigmas_net or None)}; told levels are crosses."""
    figure = Figure(figsize=(8, 0.5 * len(grids) + 1.3), dpi=120)
    axis = figure.subplots()
    for y, (_, (sigmas, sigmas_net)) in enumerate(grids.items()):
        xs = np.maximum(np.asarray(sigmas, dtype=float), floor)
        axis.plot(xs, [y] * len(xs), "o-", color=f"C{y}", markersize=6, linewidth=1)
        if sigmas_net is not None:
            xs = np.maximum(np.asarray(sigmas_net, dtype=float), floor)[:-1]  # the network is never asked at the last node
            axis.plot(xs, [y] * len(xs), "x", color="black", markersize=7, label="level told to the network")
            axis.legend(fontsize=8, loc="upper left")
    axis.set(xscale="log", xlabel="sigma (noise level)", yticks=range(len(grids)), yticklabels=list(grids), title=title)
    axis.set_ylim(-0.6, len(grids) - 0.2)
    axis.invert_xaxis()
    axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    _write(figure, path)


def save_heatmap(path, rows, xs, xlabel, title=""):
    """One labelled row of colours per entry of `rows`, {label: values}, over the positions `xs` (their labels are thinned out)."""
    figure = Figure(figsize=(7, 0.22 * len(rows) + 1.3), dpi=120)
    axis = figure.subplots()
    image = axis.imshow(np.array(list(rows.values()), dtype=float), aspect="auto", cmap="viridis", interpolation="nearest")
    every = max(1, len(xs) // 8)
    axis.set(xlabel=xlabel, title=title, yticks=range(len(rows)), xticks=range(0, len(xs), every))
    axis.set_yticklabels(list(rows), fontsize=7)
    axis.set_xticklabels([f"{x:.3g}" for x in xs[::every]], fontsize=8)
    figure.colorbar(image)
    figure.tight_layout()
    _write(figure, path)
