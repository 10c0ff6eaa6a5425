"""common/solvers.py against, from strongest to weakest:

closed forms, numbers of the official code (golden/), diffusers, finite differences.

For one Gaussian N(m, s^2), D(x, sigma) = (m sigma^2 + x s^2) / (s^2 + sigma^2), so
dx/dsigma = g(sigma) (x - m) with g = sigma / (s^2 + sigma^2), and the exact solution is
x(b) - m = (x(a) - m) sqrt((s^2 + b^2) / (s^2 + a^2)). Denoisers that ignore x turn every
solver into a quadrature rule.
"""

import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from scipy.integrate import quad
from torch.utils._python_dispatch import TorchDispatchMode

from common import UsageError
from common.diffusion import GaussianMixture, sigma_grid, v_from_x0, vp_from_edm
from common.solvers import (
    ADAMS_BASHFORTH, ORDERS, SOLVERS, TWO_EVALUATIONS, deis, dpm2, dpmpp, euler, heun, ipndm,
    steps_for, unipc, vp_time,
)
from toy import close

GOLDEN = Path(__file__).parent / "golden"
CASES = [(name, order, {}) for name in ORDERS if name != "unipc" for order in ORDERS[name]]
CASES += [
    ("unipc", order, {"variant": variant})
    for order in ORDERS["unipc"]
    for variant in ("bh1", "bh2")
]
every_solver = pytest.mark.parametrize(
    "name, order, extra",
    CASES,
    ids=lambda v: "".join(v.values()) if isinstance(v, dict) else str(v),
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


class Recorder:
    """A denoiser that records the noise levels and the states it is called with."""

    def __init__(self, denoiser):
        self.denoiser, self.sigmas, self.states = denoiser, [], []

    def __call__(self, x, sigma):
        self.sigmas.append(float(sigma))
        self.states.append(x)
        return self.denoiser(x, sigma)


def trajectory(solver, denoiser, x, sigmas, **options):
    """The states at all N + 1 nodes, through the callback."""
    states = []
    solver(denoiser, x, sigmas, callback=lambda i, x: states.append(x), **options)
    return torch.stack(states)


MIXTURE = GaussianMixture([[0.8, -0.3, 0.1], [-0.6, 0.4, -0.9]], [0.3, 0.15], [0.7, 0.3])
LATENT = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
START = 5.0 * LATENT  # at sigma = 5
GRID = tensor(5.0, 3.1, 1.6, 0.7, 0.42, 0.2, 0.05)  # uneven on purpose
NET = GRID * tensor(0.97, 1.04, 0.96, 1.02, 1.05, 0.98, 1.03)


# ----------------------------------------------------------- numbers of the official code


def golden(name):
    data = dict(np.load(GOLDEN / f"{name}.npz"))
    gmm = GaussianMixture(torch.from_numpy(data["gmm_means"]).view(5, 3, 2, 2), data["gmm_stds"])
    return data, json.loads(str(data["config"])), gmm


@pytest.fixture(scope="module")
def ld3():
    return golden("solvers_ld3")


LD3_CASES = [("euler", 1), ("heun_fixed", 2), *[("ipndm", k) for k in (2, 3, 4)]]
LD3_CASES += [(name, k) for name in ("dpmpp", "unipc_bh1", "unipc_bh2") for k in (1, 2, 3)]


def test_ld3_samplers_probe(ld3):
    """The mixture itself: what all the golden numbers below rest on."""
    data, _, gmm = ld3
    close(
        gmm(torch.from_numpy(data["probe_x"]), torch.from_numpy(data["probe_sigma"])),
        data["probe_D"],
        1e-12,
    )


@pytest.mark.parametrize("name, order", LD3_CASES)
def test_ld3_samplers(ld3, name, order):
    """LD3's own solvers on five kinds of grid, N = 3, 5, 10.

    In the last kind the conditioning noise levels differ from the grid.
    """
    data, config, gmm = ld3
    cases = enumerate(config["cases"])
    picked = [(i, c) for i, c in cases if (c["solver"], c["order"]) == (name, order)]
    assert len(picked) == 15
    solver = SOLVERS[name.split("_")[0]]
    options = {"variant": name.split("_")[1]} if solver is unipc else {}
    x = config["sigma_max"] * torch.from_numpy(data["latent"])
    for i, case in picked:
        grid = f"sched{case['sched_index']:02d}"
        sigmas = torch.from_numpy(data[f"{grid}/timesteps"])
        sigmas_net = torch.from_numpy(data[f"{grid}/timesteps2"])
        if solver is heun:
            sigmas_net = None  # the official Heun ignores the second grid
        elif case["schedule"] == "random_decoupled":
            assert (sigmas != sigmas_net).any()
        denoiser = Recorder(gmm)
        final = solver(denoiser, x, sigmas, sigmas_net=sigmas_net, order=order, **options)
        close(final, data["x_final"][i], 1e-9)
        assert len(denoiser.sigmas) == case["N"] * (2 if solver is heun else 1), case


def ode_in_t(denoiser, latent, times, sigma, s, order, alpha=1.0):
    """EDM's general sampler (Karras et al. 2022, Alg. 1 without churn), the ODE of Eq. 4 in t:

        dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x / s; sigma)

    for x = s(t) (x0 + sigma(t) noise), with the derivatives of sigma(t) and s(t) by autograd.
    `times` end in 0. order 1: Euler; 2: Heun for alpha = 1, the midpoint rule for
    alpha = 1/2, Euler in the last step.
    """

    def value_and_slope(function, t):
        t = t.detach().requires_grad_()
        value = function(t)
        slope = torch.autograd.grad(value, t)[0] if value.requires_grad else torch.zeros_like(t)
        return value.detach(), slope

    def slope(x, t):
        (level, dlevel), (scale, dscale) = value_and_slope(sigma, t), value_and_slope(s, t)
        x0 = denoiser(x / scale, level)
        return (dlevel / level + dscale / scale) * x - dlevel * scale / level * x0

    x = latent.double() * sigma(times[0]) * s(times[0])
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        h, d = t_next - t, slope(x, t)
        if order == 2 and i < len(times) - 2:
            inner = slope(x + alpha * h * d, t + alpha * h)
            d = (1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * inner
        x = x + h * d
    return x


def iddpm_levels(n):
    """iDDPM's grid (EDM, Table 1): n of the levels u_j in [.002, 81].

    u_j^2 + 1 = abar_M / abar_j with abar_j = sin^2(pi/2 j / (M (1 + 0.008))).
    """
    j = np.arange(1, 1001)
    abar = np.sin(0.5 * np.pi * j / 1000 / 1.008) ** 2
    u = np.sqrt(abar[-1] / abar - 1)
    u = u[(u >= 0.002) & (u <= 81)]
    return torch.from_numpy(u[np.round((len(u) - 1) / (n - 1) * np.arange(n)).astype(int)])


def zero(levels):
    return torch.cat([levels, levels.new_zeros(1)])


@pytest.mark.parametrize("run", range(13))
def test_edm_samplers(run):
    """EDM's generate.py: its sampler, and its ablations in other time variables.

    The ablations pin the mathematics that our solvers share.
    """
    data, config, gmm = golden("edm_samplers")
    spec, expected = config["runs"][run], data["x_final"][run]
    levels = torch.from_numpy(data[f"run{run:02d}/net_sigmas"])
    latent = torch.from_numpy(data["latent"]).double()
    n, options = spec["num_steps"], spec["kwargs"]
    denoiser, euler_run = Recorder(gmm), options.get("solver") == "euler"
    kind = options.get("discretization", "edm")
    first, last = options.get("sigma_max", 80.0), options.get("sigma_min", 0.002)
    if "limited" in spec["sampler"]:
        limits = config["limited"]
        first, last = min(first, limits["sigma_max"]), max(last, limits["sigma_min"])

    if options.get("schedule", "linear") == "linear" and "alpha" not in options:
        # sigma = t: our solvers as they are
        sigmas = zero(sigma_grid("edm", n - 1, last, first, rho=options.get("rho", 7.0)))
        if kind == "iddpm":
            # Theirs accumulates 1000 float32 steps.
            close(iddpm_levels(n) / levels, torch.ones(n), 1e-3)
            sigmas = zero(levels)
        x = (euler if euler_run else heun)(denoiser, sigmas[0] * latent, sigmas)
    else:
        scale = torch.ones_like
        if kind == "vp":
            # Linear beta: log(1 + sigma^2) = 19.9 t^2 / 2 + 0.1 t, from t = 1 to 0.001.
            sigma = lambda t: torch.expm1(9.95 * t**2 + 0.1 * t).sqrt()
            scale = lambda t: (1 + sigma(t) ** 2).rsqrt()
            times = zero(torch.linspace(1, 1e-3, n, dtype=torch.float64))
        elif kind == "ve":  # sigma = sqrt(t), levels geometric from 100 to 0.02
            sigma = torch.sqrt
            times = zero(sigma_grid("logsnr", n - 1, 0.02, 100.0) ** 2)
        else:
            sigma = lambda t: t
            times = zero(sigma_grid("edm", n - 1, last, first))
        order, alpha = 1 if euler_run else 2, options.get("alpha", 1.0)
        x = ode_in_t(denoiser, latent, times, sigma, scale, order, alpha)
    close(tensor(*denoiser.sigmas) / levels, torch.ones(spec["nfe"]), 1e-12)
    close(x, expected, 1e-10)


@pytest.mark.parametrize("solver", [euler, heun])
def test_the_general_sampler_with_sigma_equal_to_t_is_ours(solver):
    """The sampler of the ablations above is, at sigma(t) = t and s(t) = 1, our solver."""
    sigmas, order = zero(GRID), ORDERS[solver.__name__][0]
    general = ode_in_t(MIXTURE, START / 5, sigmas, lambda t: t, torch.ones_like, order)
    close(solver(MIXTURE, START, sigmas), general, 1e-12)


# ------------------------------------------------------------- closed forms, one Gaussian

MEAN, STD = 0.3, 0.6


def gaussian(x, sigma):
    return (MEAN * sigma**2 + x * STD**2) / (STD**2 + sigma**2)


def exact_factor(a, b):
    return math.sqrt((STD**2 + b**2) / (STD**2 + a**2))


def g(sigma):
    return sigma / (STD**2 + sigma**2)


@pytest.mark.parametrize("net", [GRID, NET], ids=["coupled", "decoupled"])
@pytest.mark.parametrize("end", [None, 0.0])
def test_one_step_methods_are_products_of_factors(net, end):
    """On one Gaussian, Euler, Heun and DPM-Solver-2 multiply x - m by a known factor a step.

    So they do with other conditioning noise levels and with an end at 0.
    """
    s, n = GRID.tolist(), net.tolist()
    if end is not None:
        s[-1] = end
    factors = {"euler": 1.0, "heun": 1.0, "dpm2": 1.0}
    for a, b, na, nb in zip(s, s[1:], n, n[1:]):
        h, first = b - a, 1 + (b - a) * g(na)
        factors["euler"] *= first
        factors["heun"] *= first if b == 0 else 1 + h / 2 * (g(na) + g(nb) * first)
        inner = 1 + (math.sqrt(a * b) - a) * g(na)
        factors["dpm2"] *= first if b == 0 else 1 + h * g(math.sqrt(na * nb)) * inner
    x = tensor(5.0, -2.0, 0.1)[:, None]
    for name, factor in factors.items():
        final = SOLVERS[name](gaussian, x, tensor(*s), sigmas_net=net)
        close(final, MEAN + factor * (x - MEAN), 1e-12)


def test_dpm2_is_dpm_solver_2():
    """arXiv 2206.00927, Alg. 1 with r1 = 1/2, written in lambda:

    u = x - sigma_m (e^(h/2) - 1) eps, x' = x - sigma' (e^h - 1) eps(u).
    """
    x, lam = START, -GRID.log()
    for i in range(len(GRID) - 1):
        h, middle = lam[i + 1] - lam[i], torch.exp(-(lam[i] + lam[i + 1]) / 2)
        u = x - middle * torch.expm1(h / 2) * (x - MIXTURE(x, GRID[i])) / GRID[i]
        x = x - GRID[i + 1] * torch.expm1(h) * (u - MIXTURE(u, middle)) / middle
    close(dpm2(MIXTURE, START, GRID), x, 1e-12)


def log_spaced(u, a=8.0, b=0.5):
    """From a to b at fractions u of the way in lambda."""
    return a * (b / a) ** u


def errors(solver, grid, steps, a=8.0, b=0.5, **options):
    """Of the trajectory from x = MEAN + 2 at sigma = a to b, for each number of steps."""
    x = MEAN + 2
    result = []
    for n in steps:
        sigmas = grid(torch.linspace(0, 1, n + 1, dtype=torch.float64))
        sigmas[0], sigmas[-1] = a, b
        final = solver(gaussian, tensor(x)[:, None], sigmas, **options).item()
        result.append(final - MEAN - (x - MEAN) * exact_factor(a, b))
    return result


def graded(u):
    """Steps that shrink like n^-3 at both ends.

    There, steps of lower order cost nothing, and the order of the others shows.
    """
    return log_spaced(u**3 * (10 - 15 * u + 6 * u**2))


EXPECTED_ORDERS = [(euler, {}, 1), (heun, {}, 2), (dpm2, {}, 2)]
EXPECTED_ORDERS += [(deis, {"order": k}, k + 1) for k in (1, 2, 3)]  # a polynomial of degree k
EXPECTED_ORDERS += [(dpmpp, {"order": k}, k) for k in (1, 2)]  # order 3: see below
EXPECTED_ORDERS += [  # the corrector adds one
    (unipc, {"order": k, "variant": v}, k + 1) for k in (1, 2, 3) for v in ("bh1", "bh2")
]
HIGHER_ORDERS = [(c[0], c[1]) for c in EXPECTED_ORDERS if c[2] > 1] + [(dpmpp, {"order": 3})]


@pytest.mark.parametrize("solver, options, order", EXPECTED_ORDERS)
def test_half_the_step_divides_the_error_by_two_to_the_order(solver, options, order):
    coarse, fine = errors(solver, graded, (200, 400), **options)
    assert abs(math.log2(coarse / fine) - order) < 0.25, (coarse, fine)


@pytest.mark.parametrize("solver, options", HIGHER_ORDERS)
def test_steps_of_order_one_at_the_ends_limit_an_even_grid_to_order_two(solver, options):
    """One Euler step costs O(h^2): every multistep solver's first, dpmpp's and unipc's last."""
    even = lambda u: log_spaced(u, 1.5, 0.25)
    coarse, fine = errors(solver, even, (160, 320), 1.5, 0.25, **options)
    assert abs(math.log2(coarse / fine) - 2) < 0.25, (coarse, fine)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_error_on_an_even_grid_has_the_predicted_constant(order):
    """From a = 1.5 to b = 0.25, with y = x - m and integrals over sigma from a to b.

    Euler's error is -(h / 2) int y'' y(b) / y. In higher orders the Euler start leaves
    -(h^2 / 2) y''(a), which grows to b by y(b) / y(a); Adams-Bashforth 2 adds
    -(5/12) h^2 int y''' y(b) / y, orders 3 and 4 only h^3.
    """
    a, b, s2, steps = 1.5, 0.25, STD**2, (400, 800)
    y = lambda s: 2 * exact_factor(a, s)
    second = lambda s: y(s) * s2 / (s2 + s**2) ** 2  # derivatives of a multiple of sqrt(s2 + s^2)
    third = lambda s: -3 * y(s) * s2 * s / (s2 + s**2) ** 3
    start = -second(a) * y(b) / y(a) / 2
    predicted = {
        1: -quad(lambda s: second(s) * y(b) / y(s), a, b)[0] / 2,
        2: start - 5 / 12 * quad(lambda s: third(s) * y(b) / y(s), a, b)[0],
    }.get(order, start)
    found = errors(ipndm, lambda u: a + (b - a) * u, steps, a, b, order=order)
    coarse, fine = (error / ((b - a) / n) ** min(order, 2) for error, n in zip(found, steps))
    extrapolated = 2 * fine - coarse  # to h = 0
    assert abs(extrapolated / predicted - 1) < 0.005, (coarse, fine, predicted)


# ----------------------------- denoisers that ignore x: every solver is a quadrature rule

POLYNOMIALS = [Polynomial([0.7, -0.4, 0.9, 0.35][: d + 1]) for d in range(4)]  # of degree 0 ... 3
N = len(GRID) - 1
LAM = (-GRID.log()).numpy()


def evaluate(p, x, variable):
    return sum(c * variable**k for k, c in enumerate(p.coef)) * torch.ones_like(x)


def exp_integral(p, lo, hi):
    """The integral of e^l p(l) dl: e^l (p - p' + p'' - ...) at the ends."""
    total = sum((-1) ** k * p.deriv(k) for k in range(p.degree() + 1))
    return math.exp(hi) * total(hi) - math.exp(lo) * total(lo)


def x0_increments(states):
    """x' - (sigma' / sigma) x: what a step in lambda adds.

    The exact value is sigma' times the integral of e^l D dl.
    """
    return (states[1:] - (GRID[1:] / GRID[:-1])[:, None, None] * states[:-1])[:, 0, 0]


def in_lambda(p):
    return lambda x, sigma: evaluate(p, x, -torch.as_tensor(sigma).log())


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_on_polynomials_in_lambda(order, degree):
    """What the published coefficients integrate in each step of order k.

    k rises at the start and falls to 1 at the end. k = 1: the value at the left end. k = 2:
    the line through two values, at the middle of the step. k = 3: the parabola, but with half
    of its second-order term: Taylor asks for twice the published D2. So '3M' is of second
    order, with a small constant.
    """
    p = POLYNOMIALS[degree]
    states = trajectory(dpmpp, in_lambda(p), START[:1, :1], GRID, order=order)
    increments = x0_increments(states)
    for i in range(N):
        k = min(i + 1, order, N - i)
        at, to = LAM[i], LAM[i + 1]
        if k == 1:
            seen = Polynomial([p(at)])
        elif k == 2:
            slope = (p(at) - p(LAM[i - 1])) / (at - LAM[i - 1])
            seen = Polynomial([p(at) + slope * (to - at) / 2])
        else:
            seen = p - Polynomial([-at, 1]) ** 2 * (p.deriv(2)(at) / 4 if degree == 2 else 0)
        assert abs(increments[i] - GRID[i + 1] * exp_integral(seen, at, to)) < 1e-12, (i, k)
        if k == degree + 1 == 1 or (k == 3 and degree == 1):
            assert abs(increments[i] - GRID[i + 1] * exp_integral(p, at, to)) < 1e-12


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_on_polynomials_in_lambda(order, degree, variant):
    """Corrected states (callback) are exact for degree <= k.

    Predicted states (the network's inputs) are exact for degree < k where the weights are
    solved for; where they are the constant 1/2, the value is written out. The last step is a
    prediction of order 1.
    """
    p = POLYNOMIALS[degree]
    denoiser = Recorder(in_lambda(p))
    states = trajectory(unipc, denoiser, START[:1, :1], GRID, order=order, variant=variant)
    corrected = x0_increments(states)
    assert len(denoiser.states) == N
    predicted = []
    for i, x in enumerate(denoiser.states[1:]):
        predicted.append((x - GRID[i + 1] / GRID[i] * states[i])[0, 0])
    for i in range(N):
        k, at, to, h = min(i + 1, order, N - i), LAM[i], LAM[i + 1], LAM[i + 1] - LAM[i]
        exact = GRID[i + 1] * exp_integral(p, at, to)
        left = GRID[i + 1] * exp_integral(Polynomial([p(at)]), at, to)
        half = (h if variant == "bh1" else -math.expm1(-h)) / 2
        if i == N - 1:
            assert abs(corrected[i] - left) < 1e-12
            continue
        if k == 1:
            assert abs(predicted[i] - left) < 1e-12
            assert abs(corrected[i] - (left + half * (p(to) - p(at)))) < 1e-12
        else:
            if k == 2:
                slope = (p(at) - p(LAM[i - 1])) / (at - LAM[i - 1])
                assert abs(predicted[i] - (left + half * slope * h)) < 1e-12
            elif degree < k:
                assert abs(predicted[i] - exact) < 1e-12
            if degree <= k:
                assert abs(corrected[i] - exact) < 1e-12


def in_eps(function):
    """A denoiser whose slope dx/dsigma is function(sigma), whatever x."""
    return lambda x, sigma: x - sigma * function(x, sigma)


@pytest.mark.parametrize("end", [0.05, 0.0])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_integrates_polynomials_in_vp_time_exactly(order, degree, end):
    """From the step on that has degree + 1 values.

    Degree 0 means that the weights of a step sum to sigma' - sigma.
    """
    p, sigmas = POLYNOMIALS[degree], torch.cat([GRID[:-1], tensor(end)])
    denoiser = in_eps(lambda x, sigma: evaluate(p, x, vp_time(sigma)))
    states = trajectory(deis, denoiser, START[:1, :1], sigmas, order=order)
    for i, step in enumerate((states[1:] - states[:-1])[:, 0, 0].tolist()):
        a, b = sigmas[i].item(), sigmas[i + 1].item()
        integrand = lambda s: p(vp_time(tensor(s)).item())
        exact = quad(integrand, a, b, epsabs=1e-13, epsrel=1e-13, limit=200)[0]
        if degree <= min(i, order):
            assert abs(step - exact) < 1e-10, (i, step - exact)
        else:
            assert abs(step - exact) > 1e-5, i  # no other step is exact


def test_deis_against_numpy():
    """The whole trajectory, with other conditioning noise levels too; also 80 -> 0.002 in 5.

    Weights by adaptive quadrature of Lagrange polynomials in numpy.
    """

    def weight(others, t_j, a, b):
        factors = (Polynomial([-o, 1]) / (t_j - o) for o in others)
        lagrange = math.prod(factors, start=Polynomial([1]))
        integrand = lambda sigma: lagrange(vp_time(tensor(sigma)).item())
        return quad(integrand, a, b, epsabs=1e-13, limit=200)[0]

    wide = sigma_grid("logsnr", 5)
    for sigmas, net, x, order in [
        (GRID, NET, START, 1),
        (GRID, NET, START, 2),
        (GRID, NET, START, 3),
        (wide, wide, 16 * START, 3),
    ]:
        s, t, slopes, expected = sigmas.tolist(), vp_time(sigmas).tolist(), [], x
        for i in range(len(s) - 1):
            slopes.append((expected - MIXTURE(expected, net[i])) / net[i])
            known = range(max(0, i - order), i + 1)
            update = 0
            for j in known:
                others = [t[k] for k in known if k != j]
                update = update + slopes[j] * weight(others, t[j], s[i], s[i + 1])
            expected = expected + update
        close(deis(MIXTURE, x, sigmas, sigmas_net=net, order=order), expected, 1e-10)


def test_vp_time_inverts_the_vp_noise_level():
    t = tensor(1e-6, 1e-3, 0.1, 0.5, 1.0)
    close(vp_time(torch.expm1(19.9 / 2 * t**2 + 0.1 * t).sqrt()), t, 1e-12)
    assert vp_time(tensor(0.0)) == 0


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_coefficients_are_those_of_an_even_grid(order):
    """They integrate polynomials of degree order - 1 in sigma exactly on an even grid.

    On an uneven grid they stay the same.
    """
    j = np.arange(order)
    # sum_j c_j (-j)^m = int_0^1 u^m du
    moments = np.linalg.solve((-1.0 * j)[None] ** j[:, None], 1 / (j + 1.0))
    np.testing.assert_allclose(ADAMS_BASHFORTH[order], moments, atol=1e-12)
    p, even = POLYNOMIALS[order - 1], torch.linspace(3, 0, 9, dtype=torch.float64)
    denoiser = in_eps(lambda x, sigma: evaluate(p, x, sigma))
    steps = trajectory(ipndm, denoiser, START[:1, :1], even, order=order).diff(dim=0)[:, 0, 0]
    integral = p.integ()(even.numpy())
    np.testing.assert_allclose(steps[order - 1 :], np.diff(integral)[order - 1 :], atol=1e-12)
    steps = trajectory(ipndm, denoiser, START[:1, :1], GRID, order=order).diff(dim=0)[:, 0, 0]
    values = p(GRID.numpy())
    for i in range(order - 1, N):
        assert abs(steps[i] - (GRID[i + 1] - GRID[i]) * (moments * values[i - j]).sum()) < 1e-12


def test_order_one_is_euler():
    """ipndm and dpmpp of order 1, and every multistep solver with a single step."""
    expected = euler(MIXTURE, START, GRID)
    close(ipndm(MIXTURE, START, GRID, order=1), expected, 1e-12)
    close(dpmpp(MIXTURE, START, GRID, order=1), expected, 1e-12)
    for solver in (ipndm, dpmpp, deis, unipc):
        for sigmas in (tensor(5.0, 1.0), tensor(5.0, 0.0)):
            close(solver(MIXTURE, START, sigmas), euler(MIXTURE, START, sigmas), 1e-12)


# ------------------------------------------------------------------------------ diffusers
# The schedulers take their noise levels from training tables; here they are set by hand.
# DEISMultistep is left out: its polynomials are in log(sigma), ours, as in the paper, in time.
# DPM-Solver++ and Euler round the state to float32 on purpose; `double` undoes that.


@pytest.fixture
def double(monkeypatch):
    """Inside a scheduler's module, torch.float32 means torch.float64."""

    class Torch(types.ModuleType):
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    def make(name, **config):
        diffusers = pytest.importorskip("diffusers")
        scheduler = getattr(diffusers, name)(**config)
        module = __import__(type(scheduler).__module__, fromlist=["torch"])
        monkeypatch.setattr(module, "torch", Torch("torch"))
        return scheduler

    return make


def drive(scheduler, model, z, steps):
    """model(z, i) for i = 0 ... steps - 1, each followed by the scheduler's step."""
    scheduler.num_inference_steps = steps
    scheduler.timesteps = torch.arange(steps, 0, -1).double()
    scheduler._step_index = None
    scheduler.set_begin_index(0)
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.step(model(z, i), t, z).prev_sample
    return z


noisy = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with a new numpy
ENDS = pytest.mark.parametrize(
    "sigmas", [GRID, torch.cat([GRID[:-1], tensor(0.0)])], ids=["to 0.05", "to 0"]
)


@ENDS
def test_euler_is_diffusers(double, sigmas):
    scheduler = double("EulerDiscreteScheduler", prediction_type="sample")
    scheduler.sigmas, scheduler.is_scale_input_called = sigmas, True
    x = drive(scheduler, lambda x, i: MIXTURE(x, sigmas[i]), START, N)
    close(x, euler(MIXTURE, START, sigmas), 1e-12)


@noisy
def test_heun_is_diffusers(double):
    """Theirs always ends in 0: 2N - 1 evaluations."""
    sigmas = zero(GRID)
    scheduler = double("HeunDiscreteScheduler", prediction_type="sample")
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    levels = [sigmas[(i + 1) // 2] for i in range(2 * len(GRID) - 1)]
    x = drive(scheduler, lambda x, i: MIXTURE(x, levels[i]), START, len(levels))
    close(heun(MIXTURE, START, sigmas), x, 1e-12)


@noisy
def test_dpm2_is_diffusers(double):
    """KDPM2: the inner level is the geometric mean of its neighbours; theirs always ends in 0."""
    sigmas = zero(GRID)
    inner = (sigmas * sigmas.roll(1)).sqrt()
    scheduler = double("KDPM2DiscreteScheduler", prediction_type="epsilon")
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]])
    scheduler.sigmas_interpol = torch.cat([inner[:1], inner[1:].repeat_interleave(2), inner[-1:]])
    levels = [sigmas[i // 2] if i % 2 == 0 else inner[i // 2 + 1] for i in range(2 * len(GRID) - 1)]
    x = drive(scheduler, lambda x, i: (x - MIXTURE(x, levels[i])) / levels[i], START, len(levels))
    close(dpm2(MIXTURE, START, sigmas), x, 1e-12)


@ENDS
@pytest.mark.parametrize("flow", [False, True], ids=["vp", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_is_diffusers(double, order, flow, sigmas):
    """In VP variables, and in rectified flow's: DPM-Solver++ is the same in both."""
    scheduler = double(
        "DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", solver_type="midpoint",
        solver_order=order, prediction_type="sample", lower_order_final=True, use_flow_sigmas=flow,
    )
    scheduler.sigmas = sigmas / (1 + sigmas) if flow else sigmas  # their 'sigma' of a flow is its t
    scale = 1 / (1 + sigmas) if flow else (1 + sigmas**2).rsqrt()
    z = drive(scheduler, lambda z, i: MIXTURE(z / scale[i], sigmas[i]), START * scale[0], N)
    close(dpmpp(MIXTURE, START, sigmas, order=order), z / scale[-1], 1e-11)


@ENDS
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers(double, order, variant, sigmas):
    if variant == "bh1" and sigmas[-1] == 0:
        sigmas = torch.cat([GRID[:-1], tensor(1e-9)])  # at 0 theirs multiplies B(h) = -inf by 0
    scheduler = double(
        "UniPCMultistepScheduler", solver_order=order, solver_type=variant,
        prediction_type="sample", predict_x0=True,
    )
    scheduler.sigmas, scale = sigmas, (1 + sigmas**2).rsqrt()
    z = drive(scheduler, lambda z, i: MIXTURE(z / scale[i], sigmas[i]), START * scale[0], N)
    close(unipc(MIXTURE, START, sigmas, order=order, variant=variant), z / scale[-1], 1e-11)


@ENDS
def test_ddim_is_diffusers(double, sigmas):
    """DDIM in VP variables with eps-prediction is Euler in sigma."""
    scheduler = double(
        "DDIMScheduler", num_train_timesteps=N, clip_sample=False, prediction_type="epsilon",
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(N)  # N - 1, ..., 0
    abar = 1 / (1 + sigmas**2)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = abar[:-1].flip(0), abar[-1]
    z = START * abar[0].sqrt()
    for i, t in enumerate(scheduler.timesteps.tolist()):
        x = z / abar[i].sqrt()
        z = scheduler.step((x - MIXTURE(x, sigmas[i])) / sigmas[i], t, z).prev_sample
    close(euler(MIXTURE, START, sigmas), z / abar[-1].sqrt(), 1e-12)


@ENDS
def test_ipndm_is_diffusers(double, sigmas):
    """Theirs: order 4, v-prediction, VP variables: alphas and betas are VP's alpha and sigma."""
    scheduler = double("IPNDMScheduler")
    scheduler.alphas = (1 + sigmas**2).rsqrt()
    scheduler.betas, scheduler.ets = sigmas * scheduler.alphas, []

    def v(z, i):
        x = z / scheduler.alphas[i]
        return v_from_x0(MIXTURE(x, sigmas[i]), x, sigmas[i])

    z = drive(scheduler, v, vp_from_edm(START, sigmas[0])[0], N)
    close(ipndm(MIXTURE, START, sigmas, order=4), z / scheduler.alphas[-1], 1e-11)


# ------------------------------------------------------------------------------ gradients


@every_solver
def test_gradients_are_those_of_finite_differences(name, order, extra):
    """d result / d (x, sigmas, sigmas_net), N = 4: no coefficient is detached, nor UniPC's r."""
    precision = dict(eps=1e-6, atol=1e-7, rtol=1e-6)

    def sample(x, sigmas, sigmas_net):
        return SOLVERS[name](MIXTURE, x, sigmas, sigmas_net=sigmas_net, order=order, **extra)

    inputs = START[:1] / 2, tensor(2.5, 1.3, 0.8, 0.45, 0.3), tensor(2.4, 1.35, 0.75, 0.5, 0.28)
    leaves = [v.clone().requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(sample, leaves, **precision)
    coupled = lambda s: SOLVERS[name](MIXTURE, inputs[0], s, order=order, **extra)
    assert torch.autograd.gradcheck(coupled, [inputs[1].clone().requires_grad_()], **precision)


@every_solver
def test_gradients_of_a_grid_that_ends_in_zero(name, order, extra):
    """Finite everywhere, at the level 0 too, and right for all others.

    0 itself has no two-sided difference.
    """

    def sample(x, levels):
        return SOLVERS[name](MIXTURE, x, zero(levels), order=order, **extra)

    inputs = [START[:1].clone().requires_grad_(), GRID[:4].clone().requires_grad_()]
    assert torch.autograd.gradcheck(sample, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)
    sigmas = zero(GRID[:4]).requires_grad_()
    SOLVERS[name](MIXTURE, START, sigmas, order=order, **extra).sum().backward()
    assert torch.isfinite(sigmas.grad).all(), sigmas.grad
    e = 1e-6
    above = torch.cat([GRID[:4], tensor(e)])
    forward = SOLVERS[name](MIXTURE, START, above, order=order, **extra).sum()
    at_zero = SOLVERS[name](MIXTURE, START, zero(GRID[:4]), order=order, **extra).sum()
    if name not in TWO_EVALUATIONS:  # those change their last step at 0
        assert abs((forward - at_zero) / e - sigmas.grad[-1]) < 1e-3


# ---------------------------------------------------------------- what the signature says


@every_solver
def test_conditioning_noise_levels(name, order, extra):
    """sigmas_net, exactly and in order, by default `sigmas`; never 0; NFE as documented."""
    for sigmas in (GRID, torch.cat([GRID[:-1], tensor(0.0)])):
        for net in (None, NET):
            levels = (sigmas if net is None else net).tolist()
            denoiser = Recorder(MIXTURE)
            x = SOLVERS[name](denoiser, START, sigmas, sigmas_net=net, order=order, **extra)
            assert torch.isfinite(x).all() and min(denoiser.sigmas) > 0
            expected, pairs = levels[:-1], list(zip(levels, levels[1:]))
            if name == "heun":
                expected = [level for a, b in pairs for level in (a, b)]
            if name == "dpm2":
                expected = [level for a, b in pairs for level in (a, math.sqrt(a * b))]
            if name in TWO_EVALUATIONS and sigmas[-1] == 0:
                expected = expected[:-1]
            np.testing.assert_allclose(denoiser.sigmas, expected, rtol=1e-15)


@every_solver
def test_the_result_at_sigma_zero_is_the_last_x0(name, order, extra):
    """Where the last step is of order 1, the result is the denoiser's last output.

    The other solvers extrapolate beyond it.
    """
    x0s = []

    def denoiser(x, sigma):
        x0s.append(MIXTURE(x, sigma))
        return x0s[-1]

    x = SOLVERS[name](denoiser, START, zero(GRID), order=order, **extra)
    extrapolates = (name == "ipndm" and order > 1) or name == "deis"
    if extrapolates:
        assert (x - x0s[-1]).abs().max() > 1e-6
    else:
        assert torch.allclose(x, x0s[-1], rtol=0, atol=1e-12)


@every_solver
def test_callback_sees_the_state_at_every_node(name, order, extra):
    seen = []
    denoiser = Recorder(MIXTURE)
    callback = lambda i, x: seen.append((i, x))
    x = SOLVERS[name](denoiser, START, GRID, order=order, callback=callback, **extra)
    assert [i for i, _ in seen] == list(range(N + 1))
    assert torch.equal(seen[0][1], START) and torch.equal(seen[-1][1], x)
    # unipc evaluates the predicted states; the polynomials above pin its corrected ones.
    if name != "unipc":
        inputs = denoiser.states[::2] if name in TWO_EVALUATIONS else denoiser.states
        for (_, state), evaluated in zip(seen, inputs):
            assert torch.equal(state, evaluated)
    if name not in ("dpmpp", "unipc"):  # these know where the grid ends
        for i in range(1, N):
            x = SOLVERS[name](MIXTURE, START, GRID[: i + 1], order=order, **extra)
            close(seen[i][1], x, 1e-12)


class Waits(TorchDispatchMode):
    """Counts the operations for whose result the host would wait, were the tensors on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "_linalg_", "nonzero", "lift_fresh")
        self.count += function.overloadpacket.__name__.startswith(waits)
        return function(*args, **(kwargs or {}))


@every_solver
def test_between_two_evaluations_no_gpu_is_waited_for(name, order, extra):
    """Nor in the backward pass, through the grid."""
    counts, sigmas = [], zero(GRID[:-1]).requires_grad_()
    with Waits() as waits:

        def denoiser(x, sigma):
            counts.append(waits.count)
            return x / (1 + sigma)

        SOLVERS[name](denoiser, START, sigmas, order=order, **extra).sum().backward()
    assert counts[0] > 0 and {*counts, waits.count} == {counts[0]}


@every_solver
def test_the_state_is_float64(name, order, extra):
    start, grid = START.float(), GRID.float()
    x = SOLVERS[name](MIXTURE, start, grid, order=order, **extra)
    assert x.dtype == torch.float64
    expected = SOLVERS[name](MIXTURE, start.double(), grid.double(), order=order, **extra)
    assert torch.equal(x, expected)


@every_solver
def test_rows_of_a_batch_do_not_mix(name, order, extra):
    together = SOLVERS[name](MIXTURE, START, GRID, order=order, **extra)
    alone = torch.cat(
        [SOLVERS[name](MIXTURE, row[None], GRID, order=order, **extra) for row in START]
    )
    close(together, alone, 1e-12)


@every_solver
def test_wrong_arguments_are_named_before_the_first_evaluation(name, order, extra):
    def never(x, sigma):
        raise AssertionError("evaluated")

    def refuses(pattern, sigmas=GRID, **options):
        with pytest.raises(UsageError, match=pattern) as caught:
            SOLVERS[name](never, START, sigmas, **{"order": order, **extra, **options})
        assert "\n" not in str(caught.value)

    refuses(rf"--order 7: {name} offers {ORDERS[name][0]}", order=7)
    not_numbers = tensor(5.0, float("nan")), tensor(float("inf"), 1.0)
    for bad in (
        GRID.flip(0),
        tensor(5.0, 1.0, 1.0),
        tensor(5.0, -1.0),
        tensor(5.0),
        GRID[None],
        *not_numbers,
    ):
        refuses("strictly decreasing", bad)
    refuses("sigmas_net", sigmas_net=NET[:-1])
    for level in (0.0, -1.0, float("nan")):
        for i in (0, 3, N):
            bad = NET.clone()
            bad[i] = level
            refuses("sigmas_net", sigmas_net=bad)
    if name == "unipc":
        refuses("unipc variant bh3: choose bh1 or bh2", variant="bh3")


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("ends_in_zero", [False, True])
def test_steps_for_gives_the_steps_that_take_that_many_evaluations(name, ends_in_zero):
    for nfe in range(1, 8):
        try:
            steps = steps_for(name, nfe, ends_in_zero)
        except UsageError as error:
            assert name in TWO_EVALUATIONS and nfe % 2 != ends_in_zero % 2
            for suggested in re.findall(r"\d+", str(error).partition("choose ")[2]):
                assert steps_for(name, int(suggested), ends_in_zero)
            continue
        assert name not in TWO_EVALUATIONS or nfe % 2 == ends_in_zero
        sigmas = sigma_grid("edm", steps, 0.0 if ends_in_zero else 0.05, 5.0)
        denoiser = Recorder(MIXTURE)
        SOLVERS[name](denoiser, START, sigmas)
        assert len(denoiser.sigmas) == nfe


def test_steps_for_refuses():
    with pytest.raises(UsageError, match="--solver rk45: unknown, choose one of euler, heun"):
        steps_for("rk45", 5)
    with pytest.raises(UsageError, match="--nfe 0"):
        steps_for("euler", 0)
    assert steps_for("heun", 6) == 3
    assert steps_for("heun", 7, ends_in_zero=True) == 4
    assert steps_for("dpm2", 1, ends_in_zero=True) == 1
