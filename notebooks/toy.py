"""The toy of all notebooks, how they draw it, and `check` for their exercises.

    python notebooks/toy.py      # writes the moving pictures in results/motion; half a minute

The data are points in the plane, of eight Gaussians of width 0.2 on a circle. Their denoiser is
known exactly (`exact`). A point is an "image" of two channels and one pixel, (B, 2, 1, 1), so that
the scripts' own functions take it. Every notebook uses these points, the same eight noises and the
same score, so that what one method does can be compared with what another does.
"""
import contextlib
import copy
import io
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from common.diffusion import (  # noqa: E402
    Denoiser, GaussianMixture, ddim_levels, noise_from_seeds, sigma_grid, vp_from_edm,
)
from common.machinery.plots import COLORS  # noqa: E402
from common.machinery.run import Run  # noqa: E402
from common.solvers import deis, euler  # noqa: E402
from common.teacher import edm_loss, load_student  # noqa: E402

torch.set_num_threads(1)  # small tensors: one thread is enough, and gives the same numbers
plt.rcParams.update({
    "font.size": 12, "figure.dpi": 75, "axes.titlesize": 12, "legend.fontsize": 10,
    "figure.facecolor": "white", "savefig.facecolor": "white", "legend.frameon": False,
})
GRAY, BLACK = "0.5", "black"

# ---------------------------------------------------------------------------------- the toy

WIDTH = 0.2
ANGLE = torch.arange(8) * math.pi / 4 + math.pi / 8
RING = torch.stack([ANGLE.cos(), ANGLE.sin()], 1).double()  # the eight means, (8, 2)
exact = GaussianMixture(RING.view(8, 2, 1, 1), WIDTH)  # D(x, sigma), without any error
exact.net = SimpleNamespace(img_shape=(2, 1, 1), label_dim=0)  # what scripts ask a teacher for
EIGHT = noise_from_seeds(range(8), (2, 1, 1))  # the noises whose trajectories are drawn
NOISE = noise_from_seeds(range(1000), (2, 1, 1))  # and those that are measured; its first eight
DATA = exact.sample(4000, torch.Generator().manual_seed(8))  # fresh data points, (4000, 2, 1, 1)


def sliced_distance(x, data=DATA):
    """How far two clouds of points lie apart: project both on 100 directions and sort them; the
    mean absolute difference of their quantiles. 0.026 for 1,000 exact samples."""
    directions = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    at = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    ours, theirs = (p.double().flatten(1) @ directions for p in (x, data))
    return (ours.quantile(at, 0) - theirs.quantile(at, 0)).abs().mean().item()


def inside(x):
    """The share of points within three widths of a mean."""
    near = torch.cdist(x.double().flatten(1), RING).min(1).values
    return (near < 3 * WIDTH).double().mean().item()


def rmse(x, y):
    return (x - y).square().mean().sqrt().item()


def states(solver, denoiser, x, sigmas, **options):
    """The states of a solver at all levels of its grid: (n + 1, B, ...)."""
    found = []
    with torch.no_grad():
        solver(denoiser, x, sigmas, callback=lambda i, x: found.append(x), **options)
    return torch.stack(found)


def fine_states(noise, n=400):
    """(sigmas (n + 1,), the exact trajectories from 80 noise (n + 1, B, 2, 1, 1))."""
    sigmas = sigma_grid("logsnr", n)
    return sigmas, states(deis, exact, 80 * noise, sigmas)


class Points(nn.Module):
    """A small raw network F for points: z (B, 2, 1, 1), c_noise (B,) -> (B, 2, 1, 1)."""

    img_shape, img_channels, label_dim = (2, 1, 1), 2, 0

    def __init__(self, width=128):
        super().__init__()
        sizes = (3, width, width, width, 2)
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, z, c_noise, labels=None, augment_labels=None):
        c_noise = c_noise.to(z.dtype).expand(len(z))
        return self.layers(torch.cat([z.flatten(1), c_noise[:, None]], 1)).view(z.shape)


class Velocity(nn.Module):
    """v(z, t) for cud.py: z (B, 2, 1, 1), t (B,) or a number -> (1, B, 2, 1, 1)."""

    def __init__(self, width=128):
        super().__init__()
        self.net = Points(width)

    def forward(self, z, t, heads=1, labels=None):
        t = torch.as_tensor(t).float().reshape(-1).expand(len(z))
        return self.net(z.float(), 4 * t - 2).to(z.dtype)[None]


class Stream:
    """Batches of the toy's data, as `common.datasets.Stream` gives them of images."""

    def __init__(self, batch_size, seed=0):
        self.batch_size, self.seed, self.position = batch_size, seed, 0

    def next(self):
        self.position += self.batch_size  # the whole state: a batch depends on it and the seed
        generator = torch.Generator().manual_seed(10**8 * (self.seed + 1) + self.position)
        x0 = exact.sample(self.batch_size, generator).float()
        return x0, torch.zeros(self.batch_size, dtype=torch.int64)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def trained_teacher(updates=2000, seed=0):
    """A small network, trained as a denoiser with EDM's loss: for the methods that train one."""
    torch.manual_seed(seed)
    teacher, stream = Denoiser(Points(), sigma_data=0.7), Stream(256)
    teacher.arch, teacher.kwargs = "points", {}
    optimizer = torch.optim.Adam(teacher.parameters())
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / updates)
        x0, _ = stream.next()
        sigma = (1.4 * torch.randn(256) - 0.6).exp()
        loss = edm_loss(teacher, x0, torch.randn_like(x0), sigma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


# ------------------------------------------------------------------------------ running things

_folders = []


def folder():
    """A new folder for a run, deleted when Python ends."""
    _folders.append(tempfile.TemporaryDirectory())
    return _folders[-1].name


@contextlib.contextmanager
def quiet():
    """Without the lines that scripts print (names of temporary folders, progress bars)."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def check(yours, ours, *arguments, tolerance=1e-6):
    """Compare an answer with the script's own, and print "right" or "not yet".

    Both are numbers, tensors, or lists and tuples of them; or functions, which are called with
    `arguments`.
    """
    if callable(ours):
        yours, ours = yours(*arguments), ours(*arguments)
    if yours is None or yours is Ellipsis:
        return print("not yet: nothing to compare")
    yours, ours = _flat(yours), _flat(ours)
    if len(yours) != len(ours):
        return print(f"not yet: {len(yours)} numbers, expected {len(ours)}")
    difference = (yours - ours).abs().max().item()
    right = difference <= tolerance * (1 + ours.abs().max().item())
    print(f"{'right' if right else 'not yet'}: largest difference {difference:.1e}")


def _flat(value):
    if isinstance(value, (list, tuple)):
        return torch.cat([_flat(v) for v in value])
    return torch.as_tensor(value).detach().double().flatten()


# --------------------------------------------------- six mechanisms, by the scripts' own functions

class Cosines(nn.Module):
    """A frozen "feature network" for points, for GDD's discriminator: random cosines."""

    def __init__(self, features=64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv = nn.Conv2d(2, features, 1).requires_grad_(False)
        self.conv.weight.normal_(0, 2.5, generator=generator)
        self.conv.bias.uniform_(-math.pi, math.pi, generator=generator)

    def feature_maps(self, x):
        return [2**0.5 * self.conv(x).cos()]


def classifier(x, width=0.6):
    """Features and logits of the eight Gaussians, for CFD: <mean_k, x> / width^2."""
    f = x.flatten(1) @ RING.to(x.dtype).T / width**2
    return f, f


def learned_grid(nfe=4, **options):
    """ld3.train: (Config, (sigmas, sigmas_net))."""
    import ld3

    options = {"solver": "euler", "teacher_nfe": 100, **options}
    config = ld3.Config(nfe=nfe, device="cpu", out=folder(), **options)
    with quiet():
        run = Run("ld3", config)
        return config, ld3.train(config, run, exact, ld3.make_distance(config, "cpu"))


def fitted_solver(nfe=4, grid="cosine", solver="ddim"):
    """dode.fit_lambdas: (stages, lambdas)."""
    import dode

    student, fine, targets = dode.make_plan(dode.Config(nfe=(nfe,), grid=grid), solver, nfe)
    x = 80 * noise_from_seeds(range(10**6, 10**6 + 256), (2, 1, 1))
    return student, dode.fit_lambdas(student, fine, targets, exact, x)[0]


def distilled(teacher, updates=300, **options):
    """progressive.train from 16 steps to 1: {steps: student}."""
    import progressive

    options = {"from_steps": 16, "batch_size": 256, "lr": 2e-3, **options}
    config = progressive.Config(updates=updates, device="cpu", out=folder(), **options)
    with quiet():
        run = Run("progressive", config)
        progressive.train(config, run, teacher, stream=Stream(256))
    counts = [n for n in (8, 4, 2, 1) if n < config.from_steps]
    return {n: read(run.out / f"student-{n}", teacher) for n in counts}


def read(path, teacher):
    path, = path.parent.glob(f"{path.name}.*")
    return load_student(path, copy.deepcopy(teacher))


def feature_distilled(teacher, updates=300, tau=0.95, cfd_from=8, **options):
    """cfd.train with the features above, from 16 steps to 1: {steps: student}."""
    import cfd

    options = {"from_steps": 16, "batch_size": 256, "lr": 2e-3, "tau": tau, **options}
    config = cfd.Config(cfd_from=cfd_from, updates=updates, device="cpu", out=folder(), **options)
    with quiet(), mock.patch.object(cfd, "Stream", lambda *_: Stream(256)):  # not the digits'
        run = Run("cfd", config)
        cfd.train(config, run, teacher, classifier)
    return {n: read(run.out / f"student-{n}", teacher) for n in (8, 4, 2, 1)}


def caught_up(steps=2000, tn=4, flow=False, **options):
    """cud.train_flow: a Velocity by CUD, or by its baseline rectified flow."""
    import cud

    options = {"batch_size": 256, "lr": 3e-3, "adaptive_weight": False, **options}
    config = cud.Config(
        steps=steps, tn=tn, independent=True, distill_steps=0, warmup=20, device="cpu",
        out=folder(), **options,
    )
    torch.manual_seed(0)
    trained = nn.ModuleList([Velocity()])
    names = cud.FLOWS if flow else ["cud"]
    emas = nn.ModuleDict({name: copy.deepcopy(trained[0]) for name in names})
    optimizer = torch.optim.Adam(trained.parameters())
    with quiet():
        run, state = Run("cud", config), (trained, emas.requires_grad_(False), optimizer)
        cud.train_flow(config, run, Stream(256), *state, names[-1], steps)
    return emas[names[-1]]


def adversarial(teacher, steps=800, freeze="none", **options):
    """distributional.train: (the generator, its Run, whose checkpoint has the discriminator)."""
    import distributional as gdd

    options = {"lr": 5e-4, "lr_d": 2e-3, "r1_gamma": 1.0, "r1_every": 1, **options}
    config = gdd.Config(
        images=128 * steps, batch_size=128, freeze=freeze, width=32, ema_images=1e4, device="cpu",
        out=folder(), **options,
    )
    with quiet():
        run = Run("distributional", config)
        return gdd.train(config, run, teacher, [Cosines()], Stream(128)), run


def six_mechanisms(teacher=None):
    """{name: (evaluations, colour, (t, z) of eight curves, (t, z) of the dots, 1,000 samples)}.

    t: cosine time. z = x / sqrt(1 + sigma^2). Dots: where the network is evaluated.
    """
    import cud
    import distributional as gdd
    import dode

    teacher = teacher or trained_teacher()
    found = {}

    def keep(name, nfe, color, sigmas, x):
        """Of states x (n + 1, 1000, 2, 1, 1) at the levels sigmas (n + 1,)."""
        ends = vp_from_edm(x[:, :8], sigmas)[0].flatten(2)
        curve = curves(sigmas, x[:, :8], 1 if nfe > 100 else 20)
        found[name] = nfe, color, curve, (cosine_time(sigmas[:-1]), ends[:-1]), x[-1]

    sigmas, x = fine_states(NOISE)
    keep("exact", 400, BLACK, sigmas, x)
    x, cosine = 80 * NOISE, sigma_grid("cosine", 4)
    keep("DDIM", 4, GRAY, cosine, states(euler, exact, x, cosine))
    _, (sigmas, sigmas_net) = learned_grid(4)
    found_states = states(euler, exact, x, sigmas, sigmas_net=sigmas_net)
    keep("LD3", 4, COLORS["ld3"], sigmas, found_states)
    stages, lambdas = fitted_solver(4)
    parts = [dode.integrate(exact, x, stages[:k], lambdas[:k]) for k in (1, 2, 3, 4)]
    keep("D-DDIM", 4, COLORS["d-ode"], cosine, torch.stack([x, *parts]))
    one = ddim_levels(1, 80.0)
    keep("PD", 1, COLORS["pd"], one, states(euler, distilled(teacher)[1], x, one))
    keep("CFD", 1, COLORS["cfd"], one, states(euler, feature_distilled(teacher)[1], x, one))
    flow, zs = caught_up(), []
    cud.sample(flow, NOISE, 4, callback=lambda i, z: zs.append(z))
    t, z = torch.linspace(1, 0, 5, dtype=torch.float64), torch.stack(zs).flatten(2)
    t_ends, z_ends = flow_curves(t, z[:, :8], 1)
    dots = t_ends[::2], z_ends[::2]
    found["CUD"] = 4, COLORS["cud"], flow_curves(t, z[:, :8]), dots, zs[-1]
    generator, _ = adversarial(teacher)
    with torch.no_grad():
        points = gdd.one_step(generator, 80.0)(NOISE, None)
    keep("GDD", 1, COLORS["gdd"], one, torch.stack([x, points]))
    return found


SIX = HERE / "results" / "toy" / "six.npz"  # kept by notebook 7, drawn by notebook 0


def keep_six(found):
    """Write what `six_mechanisms` returned."""
    arrays = {}
    for name, (nfe, color, curve, dots, samples) in found.items():
        values = (torch.tensor(nfe), *curve, *dots, samples)
        for key, value in zip(("nfe", "t", "z", "dots_t", "dots_z", "samples"), values):
            value = value.float() if value.is_floating_point() else value
            arrays[f"{name} {key}"] = value.numpy()
        arrays[f"{name} color"] = np.array(color)
    SIX.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(SIX, **arrays)


def kept_six():
    kept = np.load(SIX)
    found = {}
    for name in dict.fromkeys(key.split()[0] for key in kept):
        t, z, dots_t, dots_z, samples = (
            torch.from_numpy(kept[f"{name} {key}"]).double()
            for key in ("t", "z", "dots_t", "dots_z", "samples")
        )
        nfe, color = int(kept[f"{name} nfe"]), str(kept[f"{name} color"])
        found[name] = nfe, color, (t, z), (dots_t, dots_z), samples
    return found


def draw_six(found):
    """The picture of the mechanisms: trajectories, and below them samples over the data."""
    figure, axes = panels(4, 9, rows=4, sharex="row", sharey="row", height_ratios=(1.25, 1) * 2)
    t_exact, z_exact = found["exact"][2]
    for i, (name, (nfe, color, (t, z), dots, samples)) in enumerate(found.items()):
        above, below = axes[i // 4 * 2 : i // 4 * 2 + 2, i % 4]
        dashed = {"color": "0.6", "linewidth": 0.9} if name != "exact" else {"color": BLACK}
        above.plot(t_exact, z_exact[..., 0], "--", **dashed)
        if name != "exact":
            above.plot(t, z[..., 0], color=color, linewidth=1.4)
            above.plot(dots[0], dots[1][..., 0], "o", color=color, markersize=4)
        time_axis(above, "z[0]" if i % 4 == 0 else "")
        above.set_title(f"{name}\n{nfe} evaluation{'s' * (nfe > 1)}", color=color)
        scatter(below, samples, color, f"distance {sliced_distance(samples):.3f}")
    return figure


# ------------------------------------------------------------------------------------- drawing

def panels(columns=1, height=3.4, rows=1, width=8, **options):
    """plt.subplots for a notebook: legible at half the width of a page."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def legend(of, columns=2):
    """The legend of an axis or, by its last axis, of a figure; above it."""
    if isinstance(of, plt.Figure):
        handles = of.axes[-1].get_legend_handles_labels()
        return of.legend(*handles, ncols=columns, loc="outside upper center")
    return of.legend(ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1))


def evaluations(axis, counts=(1, 2, 4, 8), ticks=None, ylabel="FID*, n = 1,024"):
    """Network evaluations to the right; a logarithmic axis upwards if `ticks` says so."""
    axis.set(xscale="log", xlabel="network evaluations", ylabel=ylabel)
    axis.set_xticks(counts, counts)
    if ticks:
        axis.set_yscale("log")
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def arrows(axis, points, moves, color, **options):
    """Arrows of their true length, from points (..., 2) by moves (..., 2)."""
    look = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.007, **options}
    axis.quiver(*points.unbind(-1), *moves.unbind(-1), color=color, **look)


def cosine_time(sigma):
    """t of sigma = tan(pi t / 2): 1 is noise, 0 is data."""
    return torch.as_tensor(sigma, dtype=torch.float64).atan() / (math.pi / 2)


def curves(sigmas, x, per_step=20):
    """Euler steps between states, as curves: (cosine time (m,), z (m, B, 2)), z = x/sqrt(1+s^2).

    A step is straight in (sigma, x), and so in the variables of rectified flow, x / (1 + sigma)
    and t = sigma / (1 + sigma); there the interpolation is made.
    """
    t = (sigmas / (1 + sigmas)).double()
    z = x.flatten(2).double() / (1 + sigmas.double()).view(-1, 1, 1)
    return flow_curves(t, z, per_step)


def flow_curves(t, z, per_step=20):
    """The same of states z (n + 1, B, 2) of rectified flow at times t (n + 1,)."""
    u = torch.linspace(0, 1, per_step + 1, dtype=torch.float64)
    ts = torch.cat([a + (b - a) * u for a, b in zip(t[:-1], t[1:])])
    zs = torch.cat([a + (b - a) * u.view(-1, 1, 1) for a, b in zip(z[:-1], z[1:])])
    scale = ((1 - ts) ** 2 + ts**2).sqrt()
    return torch.atan2(ts, 1 - ts) / (math.pi / 2), zs / scale.view(-1, 1, 1)


def time_axis(axis, ylabel="z[0]"):
    axis.set(xlim=(1.02, -0.02), ylim=(-2.3, 2.3), xticks=[1, 0.5, 0], xlabel="cosine time t")
    axis.set_ylabel(ylabel)


def scatter(axis, x, color, title="", data=True, size=2):
    """Samples over gray data, all in the same window."""
    if data:
        axis.scatter(*DATA[:2000].flatten(1).T, s=1, color="0.82", rasterized=True)
    axis.scatter(*x.detach().flatten(1).T, s=size, color=color, rasterized=True)
    axis.set(title=title, aspect="equal", xlim=(-1.9, 1.9), ylim=(-1.9, 1.9))
    axis.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])


def plane(axis, sigmas, x, color=GRAY, fine=None, title=""):
    """Trajectories in the plane, in z = x / sqrt(1 + sigma^2): squares are noise, dots states."""
    for mean in RING:
        axis.add_patch(plt.Circle(mean, WIDTH, color="0.9"))
    z = vp_from_edm(x, sigmas)[0].flatten(2)
    axis.plot(*z.unbind(2), "o-", color=color, markersize=5, linewidth=1.5)
    if fine is not None:
        exact_z = vp_from_edm(fine[1], fine[0])[0].flatten(2)
        axis.plot(*exact_z.unbind(2), "--", color=BLACK, linewidth=1)
        axis.plot(*exact_z[-1].T, "o", color=BLACK, markersize=9, fillstyle="none")
    axis.plot(*z[0].T, "s", color=BLACK, markersize=6)
    axis.set(title=title, aspect="equal", xlim=(-2.2, 2.2), ylim=(-1.6, 1.6))


def strips(rows, columns=12):
    """One strip of images for each {label: (n, 1, H, W)}, in [-1, 1] or of bytes."""
    figure, axes = panels(1, 0.62 * len(rows), rows=len(rows), squeeze=False)
    for axis, (name, x) in zip(axes[:, 0], rows.items()):
        x = torch.as_tensor(x)
        low, high = (0, 255) if x.dtype == torch.uint8 else (-1, 1)
        axis.imshow(torch.cat(list(x[:columns, 0]), 1), cmap="gray", vmin=low, vmax=high)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name.replace(", NFE ", ", "), rotation=0, ha="right", va="center")
    return figure


def log_sigma(axis, ticks=(80, 10, 1, 0.1, 0.01), name="sigma: from noise to data"):
    """A logarithmic axis of noise levels, from the first tick (noise) to the last (data)."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlim(1.2 * max(ticks), 0.8 * min(ticks))
    axis.set_xlabel(name)


# The recurring picture: one exact trajectory in linear sigma, and what a step makes of it.

def bend(axis, which=2, top=2.0, bottom=0.0):
    """The trajectory of one noise, its first coordinate against sigma; its states as a function."""
    sigmas, x = fine_states(NOISE[which : which + 1], 2000)
    values = x[:, 0, 0, 0, 0]
    shown = sigmas <= top
    axis.plot(sigmas[shown], values[shown], "--", color=BLACK, label="exact trajectory")
    axis.set(xlim=(top * 1.03, bottom - 0.05 * top), xlabel="sigma", ylabel="x[0]")

    def at(sigma):
        return x[(sigmas - sigma).abs().argmin()]  # (1, 2, 1, 1)

    return at


def step(axis, sigma, x, to, aim, color=GRAY, label=None):
    """One step from x at sigma towards `aim` at sigma 0; it ends at the level `to`. (1, 2, 1, 1)."""
    end = aim + (x - aim) * (to / sigma)
    a, b, c = (p.flatten()[0].item() for p in (x, end, aim))
    axis.plot([sigma, to], [a, b], "o-", color=color, label=label)
    axis.plot([to, 0], [b, c], ":", color=color)
    axis.plot(0, c, "*", color=color, markersize=13, clip_on=False, zorder=5)
    return end


def bracket(axis, sigma, a, b, text, color=BLACK, side=-1):
    """The error between two states at one noise level."""
    a, b = a.flatten()[0].item(), b.flatten()[0].item()
    axis.annotate("", (sigma, a), (sigma, b), arrowprops={"arrowstyle": "|-|", "mutation_scale": 4,
                                                          "color": color})
    axis.annotate(text, (sigma, (a + b) / 2), (8 * -side, 0), textcoords="offset points",
                  ha="left" if side < 0 else "right", va="center", color=color)


# -------------------------------------------------------------------------------- moving pictures

def frames_of_ddim(counts=(1, 2, 4, 8, 64), points=500, frames=36):
    """500 points under DDIM on the cosine grid with few and many steps, in step with one another."""
    moving = []
    for n in counts:
        sigmas = sigma_grid("cosine", n)
        x = states(euler, exact, 80 * NOISE[:points], sigmas)
        moving.append(curves(sigmas, x, per_step=max(1, 128 // n)))
    images = []
    for time in [*torch.linspace(1, 0, frames).tolist(), *[0.0] * 10]:
        figure, axes = plt.subplots(1, len(counts), figsize=(8, 2.3), dpi=85, layout="constrained")
        for axis, n, (t, z) in zip(axes, counts, moving):
            k = int((t - time).abs().argmin())
            scatter(axis, z[k], "#d55e00" if n < 64 else BLACK, f"{n} step{'s' * (n > 1)}", size=3)
            axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[])
        figure.supxlabel(f"cosine time {time:.2f}", fontsize=11)
        images.append(_pixels(figure))
    return images


DIGITS = {  # label: (run of digits-compare, name of its rows)
    "DDIM": ("progressive", "ddim"), "LD3": ("ld3-{}", "ld3"), "D-ODE": ("dode", "d-ddim"),
    "PD": ("progressive", "pd"), "CFD": ("cfd", "cfd"), "CUD": ("cud", "cud"),
    "CUD, one step": ("cud", "cud-1step"), "GDD-I": ("distributional", "gdd-i"),
}


def kept_digits(nfe):
    """{label: images uint8 (16, 1, 8, 8)} of the kept runs with that many evaluations."""
    found = {}
    for label, (run, name) in DIGITS.items():
        path = HERE / "results" / "digits-compare" / run.format(nfe) / "samples.npz"
        kept = np.load(path) if path.exists() else {}
        if f"{name}, NFE {nfe}" in kept:
            found[label] = kept[f"{name}, NFE {nfe}"]
    return found


def frames_of_digits(counts=(1, 2, 4, 8), columns=10):
    """Six methods and DDIM on the same noise, with more and more network evaluations."""
    images = []
    for nfe in counts:
        kept = kept_digits(nfe)
        labels = [label for label in DIGITS if label != "CUD, one step"]
        figure, axes = plt.subplots(
            len(labels), 1, figsize=(6.4, 4.4), dpi=90, layout="constrained"
        )
        for axis, label in zip(axes, labels):
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(label, rotation=0, ha="right", va="center")
            for spine in axis.spines.values():
                spine.set_visible(False)
            if label in kept:
                axis.imshow(np.concatenate(list(kept[label][:columns, 0]), 1), cmap="gray")
            else:
                axis.set(xlim=(0, 8 * columns), ylim=(8, 0), aspect="equal")
                axis.text(0, 4, "-", va="center", color=GRAY)
        figure.suptitle(f"{nfe} network evaluation{'s' * (nfe > 1)}")
        images.append(_pixels(figure))
    return images


def _pixels(figure):
    from PIL import Image

    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    plt.close(figure)
    return image.quantize(32)


def save_gif(path, images, milliseconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=True
    )
    print(f"{path.name}: {len(images)} frames, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    plt.switch_backend("agg")
    save_gif(HERE / "results" / "motion" / "ddim.gif", frames_of_ddim(), 90)
    save_gif(HERE / "results" / "motion" / "digits.gif", frames_of_digits(), 1500)
