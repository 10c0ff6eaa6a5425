"""dode.py against the official code (golden/README.md section 4), closed forms and itself."""

import json
import math
import threading
from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import torch

import dode
from common import UsageError
from common.baselines import untrained_sampler
from common.diffusion import GRIDS, GaussianMixture, noise_from_seeds, sigma_grid
from common.machinery.run import Run
from common.machinery.schedule import save_schedule
from common.solvers import TWO_EVALUATIONS, dpmpp, euler, heun, ipndm
from common.teacher import load_teacher
from dode import SOLVERS, Stage
from scripts import (
    EVERYWHERE, assert_refused, calls_under_bfloat16, conditional_teacher, results, run_script,
    watch,
)
from toy import Recorder, Toy, five_blobs

ROOT = Path(__file__).parent.parent
GOLDEN = {name: np.load(ROOT / "tests" / "golden" / f"dode_{name}.npz") for name in ("edm", "vp")}


def golden(name, key):
    return torch.as_tensor(GOLDEN[name][key], dtype=torch.float64)


def mixture(name):
    return GaussianMixture(golden(name, "gmm_means").view(5, 3, 2, 2), golden(name, "gmm_stds"))


# ---------------------------------------------------------------- the solvers as stages


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_lambdas_it_is_the_solver_of_common(solver):
    denoiser, x = mixture("edm"), 80 * golden("edm", "latent1")
    grids = sigma_grid("edm", 5), sigma_grid("logsnr", 6), sigma_grid("quadratic", 1)
    for sigmas in (*grids, sigma_grid("edm", 4, sigma_min=0)):
        stages = dode.stages_of(solver, sigmas)
        expected = SOLVERS[solver](denoiser, x, sigmas)
        for lambdas in (None, [0.0] * len(stages)):
            got = dode.integrate(denoiser, x, stages, lambdas)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        evaluations = len(sigmas) - 1
        if solver in TWO_EVALUATIONS:
            evaluations = 2 * evaluations - (1 if sigmas[-1] == 0 else 0)
        assert len(stages) == evaluations


@pytest.mark.parametrize("solver", TWO_EVALUATIONS)
@pytest.mark.parametrize("nfe", [1, 3, 5])
def test_an_odd_budget_ends_with_an_euler_step(solver, nfe):
    denoiser, x = mixture("edm"), 80 * golden("edm", "latent1")
    sigmas = dode.student_grid(dode.Config(), solver, nfe)
    stages = dode.stages_of(solver, sigmas, nfe)
    x_last = SOLVERS[solver](denoiser, x, sigmas[:-1]) if nfe > 1 else x
    got, expected = dode.integrate(denoiser, x, stages), euler(denoiser, x_last, sigmas[-2:])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(stages) == nfe


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("official", [False, True])
def test_every_budget_is_met_exactly(solver, official):
    """As many evaluations as the row says, plain or distilled.

    On the official grid, which ends in 0, an even budget of Heun or DPM-Solver loses one.
    """
    for nfe in (3, 4, 5, 10):
        calls = []
        stages = dode.make_plan(dode.Config(), solver, nfe)[0]
        if official:
            stages = official_plan(solver, nfe)[0]

        def counted(x, sigma, calls=calls):
            calls.append(sigma)
            return x * 0

        dode.integrate(counted, torch.ones(1, 1, 2, 2), stages, [0.1] * len(stages))
        lost = official and solver in TWO_EVALUATIONS and nfe % 2 == 0
        assert len(calls) == len(stages) == nfe - lost


def test_lambda_one_half_in_noise_is_adams_bashforth():
    denoiser, x, sigmas = mixture("edm"), 80 * golden("edm", "latent1"), sigma_grid("edm", 6)
    got = dode.integrate(denoiser, x, dode.stages_of("ddim", sigmas), [0.0] + [0.5] * 5, "eps")
    torch.testing.assert_close(got, ipndm(denoiser, x, sigmas, order=2), rtol=1e-12, atol=1e-12)


def test_data_and_noise_differ_by_the_correction_before():
    """D_i - D_{i-1} = -sigma_i (eps_i - eps_{i-1}) + the correction of step i - 1.

    The same direction after a plain step.
    """
    denoiser, x = mixture("edm"), 80 * golden("edm", "latent1")
    stages = dode.stages_of("ddim", sigma_grid("edm", 5))
    for correction in (0.0, 0.7):
        deltas = []
        for output in ("x0", "eps"):
            point = dode.step(denoiser, dode.begin(x, 80.0, output), stages[0], output)
            point = point._replace(x=point.x + correction)
            deltas.append(dode.step(denoiser, point, stages[1], output).delta)
        gain = 1 - stages[1].to / stages[1].sigma
        torch.testing.assert_close(
            deltas[0] - deltas[1], torch.full_like(x, gain * correction), rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize("grid", ["edm", "cosine"])
def test_d_ddim_in_full_is_the_general_path(grid):
    """The function that stands first in the file, fitted and sampled."""
    denoiser, config = mixture("edm"), dode.Config(scale=4, grid=grid)
    x, new = (80 * golden("edm", f"latent{b}") for b in (1, 2))
    sigmas = dode.student_grid(config, "ddim", 5).tolist()
    state, lambdas = dode.d_ddim(denoiser, x, sigmas, scale=4)
    student, fine, targets = dode.make_plan(config, "ddim", 5)
    expected, _ = dode.fit_lambdas(student, fine, targets, denoiser, x)
    assert lambdas == pytest.approx(expected, rel=1e-9) and max(map(abs, lambdas)) > 0.1
    new_state, same = dode.d_ddim(denoiser, new, sigmas, lambdas=lambdas)
    assert same == lambdas
    for got, noise in ((state, x), (new_state, new)):
        torch.testing.assert_close(
            got, dode.integrate(denoiser, noise, student, expected), rtol=1e-9, atol=1e-10
        )


def test_the_stage_that_is_printed():
    expected = Stage(10.0, 1.0, False, (pytest.approx(-13.5), pytest.approx(4.5)))
    assert dode.stages_of("ipndm", [80, 10, 1, 0.1])[1] == expected


# ----------------------------------------------------- the official numbers, EDM's form
# Their grids, on which the noise levels of student and teacher do not meet.


def official_student_grid(solver, nfe, sigma_min=0.002, sigma_max=80.0):
    """EDM's n levels (n = nfe, or half of it), then 0: (n+1,)."""
    n = (nfe + 1) // 2 if solver in TWO_EVALUATIONS else nfe
    levels = sigma_grid("edm", n - 1, sigma_min, sigma_max)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def official_teacher_grid(student, scale, sigma_min=0.002, sigma_max=80.0):
    """(levels, targets): an EDM grid of its own; compared by the count of evaluations."""
    levels = sigma_grid("edm", scale * len(student) - 1, sigma_min, sigma_max)
    levels = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    return levels, [(k + 1) * scale for k in range(len(student))]


def official_plan(solver, nfe, scale=10):
    """As `dode.make_plan`."""
    student = dode.stages_of(solver, official_student_grid(solver, nfe), nfe)
    levels, targets = official_teacher_grid(student, scale)
    teacher = "ddim" if solver in TWO_EVALUATIONS else solver
    return student, dode.stages_of(teacher, levels), targets


@pytest.mark.parametrize(
    "key, solver, nfe",
    [
        ("ddim_n5_s10", "ddim", 5),
        ("ddim_n10_s10", "ddim", 10),
        ("edm_n5_s10", "heun", 9),
        ("edm_n10_s10", "heun", 19),
    ],
)
def test_official_edm_lambdas_and_samples(key, solver, nfe):
    """Their lambda stands outside the step: ours times the weight of D in the move."""
    denoiser = mixture("edm")
    student, teacher, targets = official_plan(solver, nfe)
    x = 80 * golden("edm", "latent1")
    lambdas, _ = dode.fit_lambdas(student, teacher, targets, denoiser, x)
    theirs = [-stage.weights[0] / stage.sigma * v for stage, v in zip(student, lambdas)]
    theirs = torch.tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(theirs, golden("edm", f"{key}/lambdas"), rtol=1e-8, atol=0)
    for b in (1, 2):  # the second batch uses the lambdas of the first
        x = dode.integrate(denoiser, 80 * golden("edm", f"latent{b}"), student, lambdas)
        torch.testing.assert_close(x, golden("edm", f"{key}/x{b}"), rtol=0, atol=1e-9)


def test_official_grids_do_not_meet_and_ours_do():
    student = dode.stages_of("ddim", official_student_grid("ddim", 10))
    levels, targets = official_teacher_grid(student, 10)
    landed = torch.tensor([stage.to for stage in student])
    expected = [45.04, 24.09, 12.12, 5.65, 2.40, 0.907, 0.292, 0.0756, 0.0141, 0]  # PAPERS.md 4e
    torch.testing.assert_close(levels[targets].float(), torch.tensor(expected), rtol=3e-3, atol=0)
    expected = torch.tensor([42.42, 21.11, 9.72])
    torch.testing.assert_close(landed[:3], expected, rtol=1e-3, atol=0)
    grids = sigma_grid("edm", 4), sigma_grid("uniform", 3), sigma_grid("edm", 3, sigma_min=0)
    for solver in SOLVERS:
        for sigmas in grids:
            student = dode.stages_of(solver, sigmas)
            levels, targets = dode.fine_grid(student, 7)
            assert levels[targets].tolist() == [stage.to for stage in student]
            assert len(levels) == 7 * len(student) + 1
            assert (levels.diff() < 0).all()
    levels, _ = dode.fine_grid(dode.stages_of("ddim", sigma_grid("edm", 6)), 10)
    torch.testing.assert_close(levels, sigma_grid("edm", 60), rtol=1e-12, atol=0)
    student, teacher, _ = dode.make_plan(dode.Config(), "heun", 4)
    assert teacher == dode.stages_of("ddim", dode.fine_grid(student, 10)[0])
    teacher = dode.make_plan(dode.Config(), "deis3", 4)[1]
    assert len(teacher[5].weights) == 4  # the others have themselves as teacher


@pytest.mark.slow
def test_official_targets_make_ddim_worse_on_digits():
    """DDIM, 10 evaluations on their student grid, 256 images for the fit, 512 others: RMSE.

    Plain .173; fitted to their targets .215; to targets at the student's levels .121.
    """
    denoiser = load_teacher(None, "digits", torch.device("cpu"))
    shape = denoiser.net.img_shape

    def in_batches(solver, x):
        with torch.no_grad():
            return torch.cat([solver(part) for part in x.split(128)])

    def teacher(x, sigma):
        return in_batches(lambda part: denoiser(part, sigma), x)

    student, far, far_targets = official_plan("ddim", 10)
    levels, targets = dode.fine_grid(student, 10)
    x = 80 * noise_from_seeds(range(10**9, 10**9 + 256), shape)
    theirs, _ = dode.fit_lambdas(student, far, far_targets, teacher, x)
    ours, _ = dode.fit_lambdas(student, dode.stages_of("ddim", levels), targets, teacher, x)

    x = 80 * noise_from_seeds(range(512), shape)
    fine = official_student_grid("ddim", 33)
    truth = in_batches(lambda part: heun(denoiser, part, fine), x)
    errors = []
    for lambdas in (None, theirs, ours):
        solver = partial(dode.integrate, stages=student, lambdas=lambdas)
        images = in_batches(partial(solver, denoiser), x)
        errors.append((images - truth).square().mean().sqrt().item())
    assert errors == pytest.approx([0.173, 0.215, 0.121], abs=5e-4)


# ----------------------------------------------- the official numbers, noise prediction
# In VP variables z = alpha x a DDIM step is z' = (alpha'/alpha) z + alpha' h eps with
# h = sigma' - sigma: ours, times alpha'. So are all their solvers, with these things of theirs:
# the trajectory starts at t = 900 (n = 10; teacher: 990) from unit noise; the first correction is
# against x_T (--output eps); targets are their teacher's z, at other noise levels; and what each
# family below says.


def vp_tables():
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return alpha_bar, alpha_bar.log()


def interpolated(table, t):
    """Linear between integers; t (n,) is clamped to [0, 999]."""
    t = torch.as_tensor(t, dtype=torch.float64).clamp(0, 999)
    k = t.long().clamp(max=998)
    return table[k] + (t - k) * (table[k + 1] - table[k])


def sigma_of(alpha_bar):
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def alpha_of(sigma):
    return 1 / math.sqrt(1 + sigma**2)


def vp_denoiser(times):
    """D for our solvers. times: {sigma of the trajectory: t that conditions the network}.

    The network's own alpha and sigma follow from log alpha_bar at t.
    """
    exact, log_alpha_bar = mixture("vp"), vp_tables()[1]

    def eps_model(z, t):
        alpha_bar = interpolated(log_alpha_bar, t).exp()
        x, sigma = z / alpha_bar.sqrt(), sigma_of(alpha_bar)
        return (x - exact(x, sigma)) / sigma

    def denoiser(x, sigma):
        return x - sigma * eps_model(alpha_of(sigma) * x, times[sigma])

    denoiser.eps_model = eps_model
    return denoiser


def ddim_plan(n):
    """Integer times int(linspace(0, 1000, n + 1)), reversed, without the noisiest one.

    Then alpha_bar = 1.
    """
    alpha_bar = vp_tables()[0]
    t = torch.linspace(0, 1000, n + 1)[:n].int().flip(0).tolist()
    sigmas = [*sigma_of(alpha_bar[t]).tolist(), 0.0]
    return [Stage(a, b, False, (b - a,)) for a, b in zip(sigmas, sigmas[1:])], dict(zip(sigmas, t))


def dpm_plan(order, n):
    """Singlestep DPM-Solver-2 and -3, n evaluations; inner nodes uniform in time: r is not 1/2."""
    # network time; their table of log alpha has t + 1 for t
    t = torch.linspace(1, 0.001, n + 1, dtype=torch.float64) * 1000 - 1
    sigmas = sigma_of(interpolated(vp_tables()[1], t).exp()).tolist()
    k = n // 3 + 1
    orders = (
        [2] * (n // 2) + [1] * (n % 2)
        if order == 2
        else [3] * (k - 2) + [2, 1]
        if n % 3 == 0
        else [3] * (k - 1) + [n % 3]
    )
    stages, first = [], 0
    for o in orders:
        s, *inner, end = sigmas[first : first + o + 1]
        h, first = math.log(s / end), first + o
        r = [math.log(s / level) / h for level in inner]
        stages.append(Stage(s, (inner + [end])[0], False, ((inner + [end])[0] - s,)))
        if o == 2:
            w = (end - s) / (2 * r[0])
            stages.append(Stage(inner[0], end, True, (w, end - s - w)))
        if o == 3:
            w = -r[1] / r[0] * inner[1] * (math.expm1(r[1] * h) / (r[1] * h) - 1)
            stages.append(Stage(inner[0], inner[1], True, (w, inner[1] - s - w)))
            w = -end / r[1] * (math.expm1(h) / h - 1)
            stages.append(Stage(inner[1], end, True, (w, 0.0, end - s - w)))
    return stages, dict(zip(sigmas, t.tolist()))


def multistep_plan(solver, n):
    """Real times from 999 to 0, alpha_bar itself interpolated, the network conditioned on t - 1.

    DEIS by a left Riemann sum of 10,000 nodes.
    """
    alpha_bar_table = vp_tables()[0]
    t = torch.linspace(999, 0, n + 1, dtype=torch.float64)
    sigmas = sigma_of(interpolated(alpha_bar_table, t).clamp(1e-7, 1 - 1e-7)).tolist()
    stages = []
    for i in range(n):
        h, count = sigmas[i + 1] - sigmas[i], min(i + 1, 4 if solver == "ipndm" else 3)
        if solver == "ipndm":
            weights = [
                h * c
                for c in {
                    1: [1],
                    2: [3 / 2, -1 / 2],
                    3: [23 / 12, -16 / 12, 5 / 12],
                    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
                }[count]
            ]
        else:
            tau = t[i] + torch.arange(10000, dtype=torch.float64) / 10000 * (t[i + 1] - t[i])
            a = interpolated(alpha_bar_table, tau).clamp(1e-7, 1 - 1e-7)
            k = tau.long().clamp(max=998)
            # d log alpha_bar / d tau, of the interpolant to the right
            slope = (alpha_bar_table[k + 1] - alpha_bar_table[k]) / a
            integrand = (
                -0.5 * slope / (a * (1 - a)).sqrt() * (t[i + 1] - t[i]) / 10000
            )  # over alpha'
            weights = []
            for j in range(count):
                lagrange = torch.ones_like(tau)
                for m in range(count):
                    if m != j:
                        lagrange = lagrange * (tau - t[i - m]) / (t[i - j] - t[i - m])
                weights.append((integrand * lagrange).sum().item())
        stages.append(Stage(sigmas[i], sigmas[i + 1], False, tuple(weights)))
    return stages, dict(zip(sigmas, (t.float() - 1).double().tolist()))


def vp_integrate(plan, z, lambdas=None):
    """All z of a trajectory from unit noise z, which they put at the first level, whichever."""
    (stages, times), states = plan, [z]
    point = dode.begin(z / alpha_of(stages[0].sigma), stages[0].sigma, "eps")
    for k, stage in enumerate(stages):
        point = dode.step(vp_denoiser(times), point, stage, "eps")
        if lambdas is not None:
            point = point._replace(x=point.x + lambdas[k] * point.delta)
        states.append(alpha_of(stage.to) * point.x)
    return states


@pytest.mark.parametrize(
    "name, n",
    [
        (name, n)
        for n in (5, 10)
        for name in ("ddim", "dpmsolver2", "dpmsolver3", "ipndm", "tab_deis2")
    ],
)
def test_official_noise_prediction_solvers(name, n):
    plan_of = {
        "ddim": ddim_plan,
        "ipndm": partial(multistep_plan, "ipndm"),
        "tab_deis2": partial(multistep_plan, "deis"),
        "dpmsolver2": partial(dpm_plan, 2),
        "dpmsolver3": partial(dpm_plan, 3),
    }[name]
    stages, times = plan = plan_of(n)
    z = {b: golden("vp", f"x_T{b}") for b in (1, 2)}
    for b in (1, 2):
        torch.testing.assert_close(
            vp_integrate(plan, z[b])[-1], golden("vp", f"{name}_n{n}/y{b}"), rtol=0, atol=1e-10
        )

    # The fit, in their way: the k-th evaluation against the teacher's k-th target, z against z.
    # DPM-Solver's teacher is DDIM.
    targets = vp_integrate((ddim_plan if "dpm" in name else plan_of)(10 * n), z[1])[10::10]
    lambdas, official = [], golden("vp", f"d_{name}_n{n}/lambdas")
    point = dode.begin(z[1] / alpha_of(stages[0].sigma), stages[0].sigma, "eps")
    for stage, target in zip(stages, targets):
        point = dode.step(vp_denoiser(times), point, stage, "eps")
        delta, rest = point.delta, target / alpha_of(stage.to) - point.x
        lambdas.append(((delta * rest).sum() / (delta * delta).sum()).item())
        if "dpm" in name:  # they keep these as float32
            lambdas[-1] = float(np.float32(lambdas[-1]))
        point = point._replace(x=point.x + lambdas[-1] * delta)
    # DPM-Solver: the same lambda. The others add lambda (E_i - E_{i-1}) to z', outside of the step:
    # alpha' h times ours.
    gains = [1 if "dpm" in name else alpha_of(s.to) * (s.to - s.sigma) for s in stages]
    theirs = torch.tensor([v * gain for v, gain in zip(lambdas, gains)], dtype=torch.float64)
    rtol = 3e-7 if "dpm" in name else 1e-8
    torch.testing.assert_close(theirs, official, rtol=rtol, atol=1e-12)
    for b in (1, 2):
        tolerance = 2e-6 if "dpm" in name else 1e-9
        got, expected = vp_integrate(plan, z[b], lambdas)[-1], golden("vp", f"d_{name}_n{n}/y{b}")
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_the_noise_model_of_the_goldens():
    got = vp_denoiser({}).eps_model
    for t, z, eps in zip(*(golden("vp", f"probe_{k}") for k in ("t", "x", "eps"))):
        torch.testing.assert_close(got(z[None], t)[0], eps, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------ the fit


@pytest.fixture(scope="module")
def toy():
    return five_blobs(0.2)


def toy_config(tmp_path, **options):
    return dode.Config(
        device="cpu",
        out=str(tmp_path),
        **{"fit_n": 64, "fit_batch": 64, "scale": 4, "grid": "edm", **options},
    )


def test_the_fit_is_float32_where_others_use_bfloat16(toy, tmp_path, monkeypatch):
    """Measured in bfloat16 on digits: ddim's and ipndm's lambdas leave the RMSE as it is; heun's,
    where D hardly changes, do not: .23 with float32's, .31 with bfloat16's at 5 evaluations."""
    seen = calls_under_bfloat16(monkeypatch, toy, "forward")
    dode.fit(toy_config(tmp_path, nfe=3), teacher=toy)
    assert set(seen) == {False}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("form", ["x0", "eps", "official grids"])
def test_each_lambda_is_the_minimiser(toy, tmp_path, monkeypatch, solver, form):
    if form == "official grids":
        monkeypatch.setattr(
            dode, "make_plan", lambda config, *job: official_plan(*job[:2], config.scale)
        )
    output = "eps" if form == "eps" else "x0"
    config = toy_config(tmp_path, solver=solver, nfe=5, output=output)
    lambdas = dode.fit(config, teacher=toy)[solver, 5]["lambdas"]
    student, teacher, targets = dode.make_plan(config, solver, 5)
    x = 80 * noise_from_seeds(range(10**9, 10**9 + 64), (1, 2, 2))
    for k in range(len(student)):
        goal = dode.integrate(toy, x, teacher[: targets[k]])

        def error(change, k=k, goal=goal):
            changed = [*lambdas[:k], lambdas[k] + change]
            got = dode.integrate(toy, x, student[: k + 1], changed, output)
            return (got - goal).square().sum().item()

        if k == 0 and output == "x0":
            assert lambdas[0] == 0 and error(1e-3) == error(0)  # there is nothing to differ from
        else:
            assert error(1e-3) > error(0) < error(-1e-3), f"stage {k}: lambda {lambdas[k]}"


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20])
def test_beats_ddim_on_one_gaussian(tmp_path, n):
    """Against the exact solution, from held-out noise.

    x(b) = m + (x(a) - m) sqrt((s^2 + b^2) / (s^2 + a^2)).
    """
    mean, std = torch.tensor([[[0.3, -0.7], [0.1, 0.5]]], dtype=torch.float64), 0.4
    gaussian = Toy(mean[None], torch.tensor([std]))
    entry = dode.fit(toy_config(tmp_path, solver="ddim", nfe=n, scale=10), teacher=gaussian)[
        "ddim", n
    ]
    x = 80 * noise_from_seeds(range(200), (1, 2, 2))
    exact = mean + (x - mean) * math.sqrt((std**2 + 0.002**2) / (std**2 + 80**2))
    stages = dode.stages_of("ddim", entry["sigmas"])
    plain, ours = (
        (dode.integrate(gaussian, x, stages, v) - exact).square().mean().sqrt().item()
        for v in (None, entry["lambdas"])
    )
    assert ours < 0.75 * plain, (n, plain, ours)


@pytest.mark.parametrize("solver", ["ddim", "deis3", "heun"])
def test_the_fit_helps_on_held_out_noise(toy, tmp_path, solver):
    entry = dode.fit(toy_config(tmp_path, solver=solver, nfe=6, scale=10), teacher=toy)[solver, 6]
    x = 80 * noise_from_seeds(range(500), (1, 2, 2))
    truth = heun(toy, x, sigma_grid("edm", 200))
    stages = dode.stages_of(solver, entry["sigmas"], 6)
    plain, ours = (
        (dode.integrate(toy, x, stages, v) - truth).square().mean().sqrt().item()
        for v in (None, entry["lambdas"])
    )
    assert ours < 0.98 * plain, (plain, ours)


def test_auto_takes_the_grid_on_which_the_plain_solver_is_best(toy, tmp_path):
    """For each solver and count, against the reference, on the fitting images alone."""
    config = toy_config(tmp_path, nfe=(3, 6), solver=("ddim", "heun"), grid="auto", scale=2)
    x = 80 * noise_from_seeds(range(10**9, 10**9 + 64), (1, 2, 2))
    reference = heun(toy, x, sigma_grid("edm", 32))
    fitted, kinds = dode.fit(config, teacher=toy), set()
    for (solver, nfe), entry in fitted.items():
        errors = {}
        for kind in GRIDS:
            named = toy_config(tmp_path, grid=kind, scale=2)
            stages = dode.stages_of(solver, dode.student_grid(named, solver, nfe), nfe)
            errors[kind] = (dode.integrate(toy, x, stages) - reference).square().sum().item()
        kind = min(errors, key=errors.get)
        named = toy_config(tmp_path, grid=kind, nfe=nfe, solver=solver, scale=2)
        expected = dode.fit(named, teacher=toy)[solver, nfe]
        assert entry["grid"] == kind and entry["sigmas"] == expected["sigmas"]
        assert entry["lambdas"] == expected["lambdas"]
        kinds.add(kind)
    assert len(kinds) > 1, kinds  # no grid is best everywhere


@pytest.mark.parametrize("output", ["x0", "eps"])
def test_batch_size_does_not_matter(toy, tmp_path, output):
    options = dict(fit_n=256, nfe=4, output=output)
    whole, parts, uneven = (
        dode.fit(toy_config(tmp_path, fit_batch=b, **options), teacher=toy) for b in (256, 64, 100)
    )
    for key, entry in whole.items():
        expected = torch.tensor(entry["lambdas"], dtype=torch.float64)
        for other in (parts, uneven):
            torch.testing.assert_close(
                torch.tensor(other[key]["lambdas"], dtype=torch.float64),
                expected, rtol=1e-10, atol=1e-10,
            )
        assert expected.abs().max() > 0.01


@pytest.mark.parametrize("free, moves", [(2**40, 0), (2**10, 1)])
def test_states_are_kept_on_the_cpu_where_the_gpu_is_short(toy, tmp_path, monkeypatch, free, moves):
    """A tensor that says it is on a GPU stays there, or moves to the CPU; lambdas are the same."""
    moved = []

    class OnGpu(torch.Tensor):
        is_cuda = True

        def cpu(self):
            moved.append(self.shape)
            return self.as_subclass(torch.Tensor)

    config = toy_config(tmp_path, nfe=3, solver="ddim")
    expected = dode.fit(config, teacher=toy)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))
    monkeypatch.setattr(
        dode, "noise_from_seeds", lambda *a: noise_from_seeds(*a).as_subclass(OnGpu)
    )
    assert dode.fit(config, teacher=toy)["ddim", 3]["lambdas"] == expected["ddim", 3]["lambdas"]
    assert len(moved) == moves


def test_fitting_noise_is_never_evaluated(toy, tmp_path, monkeypatch):
    """Fitting seeds begin at 10^9: image k of the evaluation has seed k."""
    calls = watch(monkeypatch, dode, "fit_lambdas")
    dode.fit(toy_config(tmp_path, fit_n=4, nfe=3, scale=1, solver="ddim", seed=1), teacher=toy)
    expected = 80 * noise_from_seeds(range(2 * 10**9, 2 * 10**9 + 4), (1, 2, 2))
    torch.testing.assert_close(calls[0][4], expected)


def test_conditional_teacher_gets_the_seeds_classes(tmp_path):
    teacher, seen = conditional_teacher()
    config = dode.Config(smoke=True, out=str(tmp_path), device="cpu", solver="ddim")
    dode.fit(config, teacher=teacher)
    assert all(labels is not None for labels in seen)
    assert {tuple(labels.tolist()) for labels in seen} == {
        tuple(((torch.arange(4) + first + 10**9) % 3).tolist()) for first in (0, 4)
    }


def test_resume_fits_only_what_is_missing(toy, tmp_path, monkeypatch):
    whole = dode.fit(toy_config(tmp_path / "whole", nfe=4), teacher=toy)
    config, calls = toy_config(tmp_path / "cut", nfe=4), watch(monkeypatch, dode, "fit_lambdas", 4)
    with pytest.raises(ZeroDivisionError):
        dode.fit(config, Run("dode", config, checkpoint_seconds=0), toy)
    config.resume = True
    resumed = dode.fit(config, teacher=toy)
    assert len(calls) == 4 + 3 and list(resumed) == list(whole)
    assert all(resumed[key]["lambdas"] == whole[key]["lambdas"] for key in whole)


def test_inner_products_are_summed_over_ranks(toy, monkeypatch):
    """Two threads stand for two ranks with a half of the images each (below: two processes)."""
    both, boxes, barrier = {}, {}, threading.Barrier(2, timeout=20)

    def all_reduce(sums):
        boxes[threading.get_ident()] = sums.clone()
        barrier.wait()
        total = sum(boxes.values())
        barrier.wait()
        return sums.copy_(total)

    plan = dode.make_plan(dode.Config(nfe=4, scale=4), "ddim", 4)

    def rank(r, first, count):
        x = 80 * noise_from_seeds(range(first, first + count), (1, 2, 2))
        both[r] = dode.fit_lambdas(*plan, toy, x)

    threads = [threading.Thread(target=rank, args=(r, 40 * r, 40)) for r in (0, 1)]
    with monkeypatch.context() as two:
        two.setattr(dode, "sum_over_ranks", all_reduce)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rank("one", 0, 80)
    for r in (0, 1):
        np.testing.assert_allclose(both[r][0], both["one"][0], rtol=1e-10, atol=1e-10)
        assert both[r][1] == pytest.approx(both["one"][1], rel=1e-10)


def test_every_rank_gets_its_share_of_the_presets_one_batch(toy, tmp_path, monkeypatch):
    options = dict(fit_n=6, fit_batch=6, nfe=2, solver="ddim", reference_nfe=4, grid="edm")
    config = dode.Config(device="cpu", out=str(tmp_path), **options)
    sizes = []

    def fit_lambdas(student, teacher, targets, denoiser, x, output):
        sizes.append(len(denoiser(x, 80.0)))
        return [0.0] * len(student), 0.0

    monkeypatch.setattr(dode, "fit_lambdas", fit_lambdas)
    for rank in range(4):
        monkeypatch.setattr(
            dode, "share_of", lambda n, rank=rank: slice(n * rank // 4, n * (rank + 1) // 4)
        )
        dode.fit(config, Run("dode", config), toy)
    assert sizes == [1, 2, 1, 2]


def test_every_rank_needs_an_image(toy, tmp_path):
    config = toy_config(tmp_path, fit_n=3)
    run = Run("dode", config)
    run.world = 4
    with pytest.raises(UsageError, match="--fit-n 3: there are 4 ranks"):
        dode.fit(config, run, toy)


# --------------------------------------------------------------------- the command line

run_main = partial(run_script, dode)


@pytest.mark.parametrize("options", [
    dict(nfe=(3, 4), output="eps", grid="vp", sigma_min=0.01, sigma_max=40.0, reference_nfe=10),
    dict(nfe=(5,)),  # each solver on its best grid
])
def test_every_row_is_what_its_name_and_the_options_say(tmp_path, monkeypatch, options):
    """The samplers of main, on a denoiser that writes down its noise levels."""
    taken = {}

    def measure(run, samplers, net, evaluator, reference):
        taken.update(samplers)
        return [{"name": name, "nfe": nfe} for name, nfe in samplers], {}

    teacher, plain = five_blobs(0.2, Recorder), five_blobs(0.2, Recorder)
    monkeypatch.setattr(dode, "load_teacher", lambda *a: teacher)
    for name in ("make_evaluator", "save_rows"):
        monkeypatch.setattr(dode, name, lambda *a: None)
    monkeypatch.setattr(dode, "measure", measure)
    arguments = []
    for key, value in options.items():
        several = value if isinstance(value, tuple) else [value]
        arguments += [f"--{key.replace('_', '-')}", *several]
    run_main(
        monkeypatch, *arguments, "--fit-n", 32, "--scale", 3, "--device", "cpu", "--out", tmp_path
    )
    noise, labels = noise_from_seeds(range(5), (1, 2, 2)), torch.arange(5)
    config = dode.Config(**options)
    x, ends = config.sigma_max * noise, (config.sigma_min, config.sigma_max)
    entries = json.loads((tmp_path / "lambdas.json").read_text())["solvers"]
    entries = {(entry["solver"], entry["nfe"]): entry for entry in entries}
    wanted = {("teacher", config.reference_nfe): lambda: heun(
        plain, x, sigma_grid("edm", config.reference_nfe // 2, *ends)
    )}
    for (solver, nfe), entry in entries.items():
        two = solver in TWO_EVALUATIONS
        assert options.get("grid", entry["grid"]) == entry["grid"]

        def distilled(solver=solver, nfe=nfe, entry=entry, lambdas=None):
            stages = dode.stages_of(solver, entry["sigmas"], nfe)
            return dode.integrate(plain, x, stages, lambdas, config.output)

        wanted[f"d-{solver}", nfe] = partial(distilled, lambdas=entry["lambdas"])
        wanted[solver, nfe] = distilled
        if nfe % 2 == 0 or not two:
            sigmas = sigma_grid(entry["grid"], nfe // 2 if two else nfe, *ends)
            wanted[solver, nfe] = partial(SOLVERS[solver], plain, x, sigmas)
    for nfe in config.nfe:
        sigmas = torch.tensor(entries["ddim", nfe]["sigmas"], dtype=torch.float64)
        wanted["ab2", nfe] = partial(ipndm, plain, x, sigmas, order=2)
        wanted["dpmpp2m", nfe] = partial(dpmpp, plain, x, sigmas, order=2)
        name, sampler = untrained_sampler(plain, "digits", nfe, *ends)
        wanted[name, nfe] = partial(sampler, noise, None)
    assert taken.keys() == wanted.keys()
    for (name, nfe), expected in wanted.items():
        teacher.levels, teacher.labels, plain.levels = [], [], []
        torch.testing.assert_close(taken[name, nfe](noise, labels), expected(), rtol=0, atol=1e-9)
        assert all(used is labels for used in teacher.labels)
        assert len(teacher.levels) == nfe and teacher.levels == pytest.approx(plain.levels), name
    images = {key: taken[key](noise, None) for key in taken}
    assert all((images[s, n] != images[f"d-{s}", n]).any() for s, n in entries)


def test_smoke_run_leaves_everything_and_the_lambdas_read_back(monkeypatch, tmp_path, tiny):
    budget = ["--nfe", 3, 4, "--solver", "ddim", "heun", "--smoke", "--device", "cpu"]
    budget += ["--teacher", tiny]
    run_main(monkeypatch, *budget, "--out", tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {
        "metrics.json", "samples.png", "samples.npz", "lambdas.png", "lambdas.json", "log.jsonl",
        "checkpoint.pt",
    }
    rows = results(tmp_path / "a")
    fitted = ["ddim", "d-ddim", "heun", "d-heun"]
    others = ["ab2", "dpmpp2m", "untrained"]
    names = [(row["name"].split(" ")[0], row["nfe"]) for row in rows]
    expected = product((3, 4), fitted), product((3, 4), others)
    assert names == [(name, nfe) for nfe, name in chain(*expected)] + [("teacher", 8)]
    assert all(row["grid"] in GRIDS for row in rows[:8])
    assert all(row["fid_n"] == 32 and row["fid_features"] == "digits-classifier" for row in rows)
    evaluations = 8 * (3 + 30 + 6 * 3 + 8)
    assert rows[1]["fit_evaluations"] == rows[3]["fit_evaluations"] == evaluations
    assert rows[1]["fit_seconds"] > 0
    assert all(row["rmse_to_teacher"] > 0 for row in rows[:-1]) and rows[-1]["rmse_to_teacher"] == 0

    lambdas = tmp_path / "a" / "lambdas.json"
    run_main(monkeypatch, *budget, "--lambdas", lambdas, "--out", tmp_path / "b")
    assert results(tmp_path / "b") == rows and not (tmp_path / "b" / "lambdas.json").exists()

    modified = (tmp_path / "a" / "checkpoint.pt").stat().st_mtime_ns
    run_main(monkeypatch, *budget, "--resume", "--out", tmp_path / "a")  # only measured again
    assert results(tmp_path / "a") == rows
    assert (tmp_path / "a" / "checkpoint.pt").stat().st_mtime_ns == modified


def test_the_grid_may_be_one_that_ld3_learned(tmp_path, monkeypatch, tiny):
    """Scalars of every solver, and the plain ones, on the levels of its schedule.json."""
    sigmas = torch.tensor([80, 9, 2, 0.3, 0.002], dtype=torch.float64)
    save_schedule(tmp_path / "schedule.json", sigmas, sigmas)
    arguments = ("--smoke", "--teacher", tiny, "--nfe", 4, "--solver", "ddim", "deis2")
    arguments += ("--out", tmp_path)
    run_script(dode, monkeypatch, *arguments, "--schedule", tmp_path / "schedule.json")
    entries = json.loads((tmp_path / "lambdas.json").read_text())["solvers"]
    assert [e["sigmas"] for e in entries] == 2 * [sigmas.tolist()]
    rows = results(tmp_path)
    found = {row["name"]: row["rmse_to_teacher"] for row in rows}
    teacher, x = load_teacher(tiny, "digits", "cpu"), 80 * noise_from_seeds(range(32), (1, 8, 8))
    with torch.no_grad():
        reference = heun(teacher, x, sigma_grid("edm", 4))
        for name, x0 in (
            ("ddim", euler(teacher, x, sigmas)), ("ab2", ipndm(teacher, x, sigmas, order=2))
        ):
            rmse = (x0 - reference).square().mean().sqrt().item()
            assert found[name] == pytest.approx(rmse, rel=1e-4)
    # Read back by --lambdas, with the same grid alone.
    again = ("--lambdas", tmp_path / "lambdas.json", "--schedule", tmp_path / "schedule.json")
    run_script(dode, monkeypatch, *arguments[:-1], tmp_path / "again", *again)
    assert rows == results(tmp_path / "again")


def entry_of(solver="ddim", nfe=4, **changes):
    sigmas = dode.student_grid(dode.Config(grid="edm"), solver, nfe).tolist()
    return {
        "solver": solver, "nfe": nfe, "grid": "edm", "sigmas": sigmas, "lambdas": [0.1] * nfe,
        "fit_evaluations": 1, "fit_seconds": 1, **changes,
    }


FILES = {
    "GOOD": {"output": "x0", "solvers": [entry_of(), entry_of("deis2")]},
    "EPS": {"output": "eps", "solvers": [entry_of()]},
    "GRID": {"output": "x0", "solvers": [entry_of(sigmas=sigma_grid("logsnr", 4).tolist())]},
    "SHORT": {"output": "x0", "solvers": [entry_of(lambdas=[0.1] * 3)]},
    "NAN": {"output": "x0", "solvers": [entry_of(lambdas=[0.1, 0.1, float("nan"), 0.1])]},
    "NAN_OF_5": {"output": "x0", "solvers": [entry_of(lambdas=[float("nan"), *[0.1] * 4])]},
    "HUGE": {"output": "x0", "solvers": [entry_of(lambdas=[0.1, 0.1, -1e10, 0.1])]},
    "HUGER": {"output": "x0", "solvers": [entry_of(lambdas=[10**400] * 4)]},
    "HUGE_GRID": {"output": "x0", "solvers": [entry_of(sigmas=[10**400] * 5)]},
    "CONTROL": {"output": "x0", "solvers": [{**entry_of(), "solver": "dd\x07im", "nfe": "\n"}]},
    "CONTROL_2": {"output": "x0\x1b[2J\n", "solvers": [entry_of(lambdas=["\x1b\n"] * 4)]},
    "CONTROL_3": {"output": "x0\x1b[2J\n", "solvers": [entry_of(grid="\x1b\n")]},
    "OTHER": {"output": "x0", "solvers": [entry_of(grid="cats")]},
    "DECOUPLED": {"sigmas": [80, 9, 2, 1, 0.002], "sigmas_net": [80, 8, 2, 1, 0.002]},
    "COUPLED": {"sigmas": [80, 9, 2, 1, 0.002], "sigmas_net": [80, 9, 2, 1, 0.002]},
    "LIST": [1, 2],
    "WORDS": {"output": "x0", "solvers": [entry_of(lambdas=["a", "b", "c", "d"])]},
}


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--solver", "rk45"], ["--solver", "rk45", "ddim"]),
        (["--nfe", "0"], ["--nfe 0"]),
        (["--scale", "0"], ["--scale 0"]),
        (["--fit-n", "0"], ["--fit-n 0"]),
        (["--fit-batch", "0"], ["--fit-batch 0"]),
        (["--reference-nfe", "1"], ["--reference-nfe 1"]),
        (["--sigma-min", "90"], ["--sigma-min 90", "below --sigma-max 80"]),
        (["--sigma-min", "0"], ["--sigma-min 0"]),
        (["--teacher", "nowhere.pt"], ["nowhere.pt"]),
        (["--teacher", "FOREIGN"], ["foreign.pt"]),
        (["--lambdas", "nowhere.json"], ["--lambdas nowhere.json"]),
        (["--lambdas", "FOREIGN"], ["--lambdas", "foreign.pt", "not a lambdas.json"]),
        (["--lambdas", "LIST"], ["--lambdas", "LIST", "not a lambdas.json"]),
        (["--lambdas", "WORDS"], ["--lambdas", "WORDS", "not a lambdas.json"]),
        *(
            (["--lambdas", name], ["--lambdas", name, "has", f"{count} of", "needs", "4 of 4"])
            for name, count in (("NAN", 3), ("NAN_OF_5", 4), ("HUGE", 3), ("SHORT", 3))
        ),
        *((["--lambdas", name], [name, "not a lambdas.json"]) for name in ("HUGER", "HUGE_GRID")),
        (["--lambdas", "CONTROL"], ["CONTROL", "dd\\x07im at", "--solver ddim --nfe 4"]),
        (["--lambdas", "CONTROL_2"], ["CONTROL_2", "not a lambdas.json"]),
        (["--lambdas", "CONTROL_3", "--grid", "edm"], ["CONTROL_3", "x0?[2J", "--output x0,"]),
        (["--lambdas", "OTHER"], ["time grid cats: unknown"]),
        (
            ["--lambdas", "GOOD", "--solver", "heun"],
            ["--lambdas", "GOOD", "--solver heun", "ddim at 4", "deis2 at 4"],
        ),
        (["--lambdas", "GOOD", "--nfe", "5"], ["--lambdas", "GOOD", "--nfe 5", "ddim at 4"]),
        (["--lambdas", "GOOD", "--sigma-max", "70"], ["--lambdas", "GOOD", "80", "70"]),
        (
            ["--lambdas", "GRID", "--grid", "edm"],
            ["--lambdas", "GRID", "has", "grid 80, 5.65685", "needs", "grid 80, 17.5278"],
        ),
        (["--lambdas", "EPS"], ["--lambdas", "EPS", "--output eps", "--output x0"]),
        (["--schedule", "nowhere.json", "--nfe", "4"], ["--schedule nowhere.json"]),
        (["--schedule", "DECOUPLED", "--nfe", "4"], ["--schedule", "--times coupled"]),
        (["--schedule", "COUPLED", "--nfe", "4"], ["5 levels", "needs 3", "heun", "--solver"]),
        (["--schedule", "COUPLED", "--nfe", "5", "--solver", "ddim"], ["5 levels", "needs 6"]),
        *EVERYWHERE,
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    if "--lambdas" in arguments:
        arguments = ["--solver", "ddim", "--nfe", "4", *arguments]
    assert_refused(
        dode, monkeypatch, tmp_path, arguments, names, **{name: tmp_path / name for name in FILES}
    )
