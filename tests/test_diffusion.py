"""common/diffusion.py against:

formulas written a second time, golden grids, numerical integration, scipy's Gaussians.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad, trapezoid
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm
from torch import nn

from common import UsageError, diffusion
from common.diffusion import (
    Denoiser, GaussianMixture, check_grid, expand, noise_from_seeds, sigma_grid, with_labels,
)
from common.solvers import euler
from toy import close

GOLDEN = Path(__file__).parent / "golden"


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- Denoiser


class Affine(nn.Module):
    """F(z, c_noise) = a z + b c_noise + c + labels[:, 0] + 10 augment_labels[:, 0].

    It shows each coefficient alone.
    """

    def __init__(self, a=0.0, b=0.0, c=0.0, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([a, b, c], dtype=dtype))
        self.seen = []

    def forward(self, z, c_noise, labels=None, augment_labels=None):
        self.seen.append((z, c_noise, labels, augment_labels))
        a, b, c = self.weight
        f = a * z + c + b * c_noise[:, None, None, None]
        for scale, given in ((1, labels), (10, augment_labels)):
            if given is not None:
                f = f + scale * given[:, 0, None, None, None]
        return f


IMAGES = draw(3, 2, 4, 4)
LEVELS = torch.tensor([0.01, 0.5, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_preconditioning_is_edm_table_1(sigma_data):
    """Each coefficient alone, by networks that return 0, 1, their input, and c_noise."""
    s, d = LEVELS.view(3, 1, 1, 1), sigma_data
    c_skip, c_out, c_in = (
        d**2 / (s**2 + d**2),
        s * d / (s**2 + d**2) ** 0.5,
        1 / (s**2 + d**2) ** 0.5,
    )
    skip = c_skip * IMAGES
    close(Denoiser(Affine(), d)(IMAGES, LEVELS), skip, 1e-13)
    close(Denoiser(Affine(c=1), d)(IMAGES, LEVELS), skip + c_out, 1e-13)
    close(Denoiser(Affine(a=1), d)(IMAGES, LEVELS), skip + c_out * c_in * IMAGES, 1e-13)
    close(
        Denoiser(Affine(b=1), d)(IMAGES, LEVELS),
        skip + c_out * LEVELS.log().view(3, 1, 1, 1) / 4,
        1e-12,
    )
    # The purpose of Table 1 (EDM, B.6): the network's input and its target have variance 1,
    # and c_skip makes c_out minimal.
    close(c_in**2 * (d**2 + s**2), torch.ones_like(s), 1e-12)
    close((((1 - c_skip) * d) ** 2 + (c_skip * s) ** 2) / c_out**2, torch.ones_like(s), 1e-12)
    for other in (c_skip * 0.99, c_skip * 1.01):
        assert (((1 - other) * d) ** 2 + (other * s) ** 2 > c_out**2).all()
    assert Denoiser(Affine()).sigma_data == 0.5


def test_denoiser_takes_one_level_for_all_or_one_for_each():
    denoiser = Denoiser(Affine(0.3, -0.7, 0.2))
    each = torch.stack([denoiser(IMAGES[i : i + 1], sigma)[0] for i, sigma in enumerate(LEVELS)])
    close(denoiser(IMAGES, LEVELS), each, 1e-14)
    for level in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.full((3,), 0.5)):
        close(denoiser(IMAGES, level), denoiser(IMAGES, LEVELS[1].expand(3)), 1e-14)
        c_noise = denoiser.net.seen[-2][1]
        assert c_noise.shape == (3,)  # the network always gets one c_noise per image


def test_denoiser_passes_labels_and_augment_labels_to_the_network():
    net = Affine()
    denoiser, labels, augment = Denoiser(net), draw(3, 5, seed=1), draw(3, 9, seed=2)
    base, c_out = denoiser(IMAGES, 2.0), 2.0 * 0.5 / math.sqrt(4.25)

    def adds(value, **given):
        close(
            denoiser(IMAGES, 2.0, **given) - base,
            (c_out * value).view(3, 1, 1, 1).expand_as(base),
            1e-12,
        )

    adds(labels[:, 0], labels=labels)
    adds(10 * augment[:, 0], augment_labels=augment)
    adds(labels[:, 0] + 10 * augment[:, 0], labels=labels, augment_labels=augment)
    by_name = denoiser(IMAGES, 2.0, labels=labels, augment_labels=augment)
    close(denoiser(IMAGES, 2.0, labels, augment), by_name, 0)
    indices = torch.tensor([3, 0, 1])
    denoiser(IMAGES, 2.0, indices[:, None])
    assert net.seen[-1][2].dtype == torch.int64 and torch.equal(net.seen[-1][2][:, 0], indices)


def test_denoiser_computes_in_the_networks_precision_and_returns_that_of_x():
    for net_dtype, computed in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        net = Affine(0.25, -0.5, 0.125, dtype=net_dtype)
        denoiser = Denoiser(net)
        out = denoiser(IMAGES, LEVELS)
        z, c_noise = net.seen[0][:2]
        assert out.dtype == torch.float64 and z.dtype == c_noise.dtype == computed
        # A float32 network computes in float32, even for a float64 x.
        assert torch.equal(out, denoiser(IMAGES.to(computed), LEVELS).double())
        exact = Denoiser(Affine(0.25, -0.5, 0.125))(IMAGES, LEVELS)
        close(out, exact, 1e-14 if computed == torch.float64 else 1e-5)
        assert computed == torch.float64 or not torch.equal(out, exact)
    assert denoiser(IMAGES.float(), LEVELS).dtype == torch.float32


def test_denoiser_tends_to_x():
    denoiser = Denoiser(Affine(5.0, 1.0, -3.0))
    for sigma in (1e-3, 1e-6):
        close(denoiser(IMAGES, sigma), IMAGES, 40 * sigma)
    assert torch.equal(denoiser(IMAGES, 0.0), IMAGES)  # although log 0 is infinite
    assert (denoiser(IMAGES, 1e-1) - IMAGES).abs().max() > 0.1


def test_denoiser_keeps_the_names_of_edm_checkpoints():
    net = Affine(1, 2, 3)
    denoiser = Denoiser(net)
    state = denoiser.state_dict()
    assert denoiser.net is net and len(state) == 1
    assert torch.equal(state["model.weight"], net.weight)
    other = Denoiser(Affine())
    other.load_state_dict(denoiser.state_dict(), strict=True)
    close(other(IMAGES, LEVELS), denoiser(IMAGES, LEVELS), 0)


def test_expand():
    x = draw(3, 2, 4, 4)
    each = expand(torch.arange(3), x)
    assert each.shape == (3, 1, 1, 1) and each.dtype == x.dtype
    assert (each * torch.ones_like(x))[2, 1, 3, 3] == 2
    assert expand(2, x).shape == (1, 1, 1, 1) and expand(2, x).item() == 2


# ---------------------------------------------------------------------------------- noise


def test_noise_of_an_image_depends_on_its_seed_alone():
    shape = (3, 4, 4)
    noise = noise_from_seeds([5, 6, 7, 2**40], shape)
    assert noise.dtype == torch.float64 and noise.shape == (4, *shape)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    # Another batch, another order.
    assert torch.equal(noise_from_seeds(torch.tensor([7, 5]), shape), noise[[2, 0]])
    assert torch.equal(noise_from_seeds(range(6, 7), shape), noise[1:2])
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    by_hand = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(noise[0], by_hand.double())
    flat = noise_from_seeds(range(2000), (16,))
    assert abs(flat.mean()) < 5 / math.sqrt(flat.numel())
    assert abs(flat.var() - 1) < 5 * math.sqrt(2 / flat.numel())
    # No two seeds share an image.
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.999


# ----------------------------------------------------------------------------- time grids

FORMULAS = {  # noise level k of n, written out
    "uniform": lambda k, n, lo, hi: hi + k / n * (lo - hi),
    "quadratic": lambda k, n, lo, hi: lo + (hi - lo) * ((n - k) / n) ** 2,
    "logsnr": lambda k, n, lo, hi: math.exp(
        -(-math.log(hi) + k / n * (math.log(hi) - math.log(lo)))
    ),
    "edm": lambda k, n, lo, hi: (hi ** (1 / 7) + k / n * (lo ** (1 / 7) - hi ** (1 / 7))) ** 7,
    "cosine": lambda k, n, lo, hi: (
        hi if k == 0 else lo if k == n else math.tan(math.pi / 2 * (n - k) / n)
    ),
    "vp": lambda k, n, lo, hi: brentq(  # sigma whose time is k / n of the way
        lambda s: vp(s) - vp(hi) - k / n * (vp(lo) - vp(hi)), 0, 100, xtol=1e-14, rtol=1e-14
    ),
}


def vp(sigma):
    """Time of the VP process with betas from .1 to 20: 1 + sigma^2 = exp(integral of beta)."""
    return brentq(lambda t: 0.1 * t + 19.9 * t**2 / 2 - math.log1p(sigma**2), 0, 2, xtol=1e-15)


@pytest.mark.parametrize("kind", diffusion.GRIDS)
@pytest.mark.parametrize("n", [1, 2, 5, 18])
@pytest.mark.parametrize("lo, hi", [(0.002, 80.0), (0.02, 50.0), (0.0, 80.0)])
def test_grids_are_their_formulas(kind, n, lo, hi):
    if kind == "logsnr" and lo == 0:
        with pytest.raises(UsageError, match="logsnr time grid from sigma 80.0 to 0.0"):
            sigma_grid(kind, n, lo, hi)
        return
    sigmas = sigma_grid(kind, n, lo, hi)
    assert sigmas.dtype == torch.float64 and (sigmas.diff() < 0).all()
    assert sigmas[0] == hi and sigmas[-1] == lo
    close(sigmas, [FORMULAS[kind](k, n, lo, hi) for k in range(n + 1)], 1e-11)


def test_defaults_of_the_grids():
    close(sigma_grid("edm", 6), sigma_grid("edm", 6, 0.002, 80.0, 7.0), 0)
    close(
        sigma_grid("edm", 4, 0.01, 40.0, rho=3)[1:2],
        [(40 ** (1 / 3) + 1 / 4 * (0.01 ** (1 / 3) - 40 ** (1 / 3))) ** 3],
        1e-12,
    )


def test_cosine_grid_is_vp_time_even_in_angle():
    """alpha = cos(pi t / 2) = 1 / sqrt(1 + sigma^2), so the angle decreases evenly.

    The grid is clipped at both ends, but never so far that two levels become equal.
    """
    angle = torch.acos((1 + sigma_grid("cosine", 8, 0.0) ** 2).rsqrt())[1:]
    close(angle, math.pi / 2 * torch.arange(7, -1, -1).double() / 8, 1e-12)
    refused = "cosine time grid with 8 steps.*not a strictly decreasing"
    with pytest.raises(UsageError, match=refused):
        sigma_grid("cosine", 8, 0.5, 80.0)  # tan(pi / 16) = 0.2 would become 0.5 too


def test_grids_are_those_of_ld3_and_edm():
    """float32 numbers of LD3's code; float64 levels of EDM's, whose sampler appends a 0."""
    data = np.load(GOLDEN / "solvers_ld3.npz")
    names = {
        "edm": "edm",
        "logSNR": "logsnr",
        "time_uniform": "uniform",
        "time_quadratic": "quadratic",
    }
    schedules = [s for s in json.loads(str(data["config"]))["schedules"] if s["kind"] in names]
    assert len(schedules) == 12
    for s in schedules:
        official = torch.from_numpy(data[f"sched{s['index']:02d}/timesteps"])
        ratio = sigma_grid(names[s["kind"]], s["N"]) / official
        close(ratio, torch.ones(s["N"] + 1), 5e-6 if s["kind"] == "edm" else 2e-6)
    data = np.load(GOLDEN / "edm_samplers.npz")
    for run, (n, lo, hi, rho) in {2: (5, 0.002, 80.0, 7), 6: (18, 0.002, 80.0, 7)}.items():
        official = torch.from_numpy(data[f"run{run:02d}/net_sigmas"])
        close(sigma_grid("edm", n - 1, lo, hi, rho) / official, torch.ones(n), 1e-12)
    heun_levels = torch.from_numpy(data["run01/net_sigmas"])[::2]
    close(sigma_grid("edm", 4, 0.01, 40.0, 3) / heun_levels, torch.ones(5), 1e-12)


@pytest.mark.parametrize(
    "arguments, pattern",
    [
        (
            ("karras", 5),
            "time grid karras: unknown, choose one of uniform, quadratic, logsnr, edm, cosine",
        ),
        (("edm", 0), "with 0 steps"),
        (("edm", 5, -0.1), "from sigma 80.0 to -0.1"),
        (("edm", 5, 80.0, 80.0), "from sigma 80.0 to 80.0"),
        (("uniform", 5, 3.0, 2.0), "from sigma 2.0 to 3.0"),
        (("uniform", 5, 0.0, 0.0), "must decrease"),
        (("uniform", 5, 0.1, math.inf), "must decrease and be finite"),
        (("uniform", 5, math.nan), "must decrease"),
    ],
)
def test_wrong_grids_are_named(arguments, pattern):
    with pytest.raises(UsageError, match=pattern):
        sigma_grid(*arguments)


def test_check_grid():
    good = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    assert check_grid(good, "it") is good
    for bad in (
        [2.0, 2.0],
        [1.0, 2.0],
        [1.0],
        [1.0, -1.0],
        [math.nan, 1.0],
        [math.inf, 1.0],
        [[2.0, 1.0]],
        3.0,
    ):
        refused = "^it: .* is not a strictly decreasing list of levels >= 0$"
        with pytest.raises(UsageError, match=refused):
            check_grid(torch.tensor(bad), "it")


# ---------------------------------------------------------------------------- conversions

X0, NOISE = draw(4, 2, 3, seed=3), draw(4, 2, 3, seed=4)
SIGMAS = [0.7, torch.tensor([0.02, 0.4, 3.0, 60.0], dtype=torch.float64)]
each_sigma = pytest.mark.parametrize("sigma", SIGMAS, ids=["scalar", "(B,)"])


def noised(sigma):
    s = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1)
    return X0 + s * NOISE, s


@each_sigma
def test_conversions_are_their_definitions(sigma):
    """From x0 and the noise, which the conversions do not see."""
    x, s = noised(sigma)
    alpha, t = 1 / (1 + s**2).sqrt(), s / (1 + s)
    beta = alpha * s  # VP's noise level
    close(alpha**2 + beta**2, torch.ones_like(s), 1e-12)
    tolerance = 1e-12
    close(diffusion.eps_from_x0(X0, x, sigma), NOISE, tolerance)
    close(diffusion.v_from_x0(X0, x, sigma), alpha * NOISE - beta * X0, tolerance)
    close(diffusion.velocity_from_x0(X0, x, sigma), NOISE - X0, tolerance)
    close(diffusion.score_from_x0(X0, x, sigma), -NOISE / s, 1e-10)
    close(diffusion.x0_from_eps(NOISE, x, sigma), X0, tolerance)
    close(diffusion.x0_from_v(alpha * NOISE - beta * X0, x, sigma), X0, tolerance)
    close(diffusion.x0_from_velocity(NOISE - X0, x, sigma), X0, tolerance)
    close(diffusion.x0_from_score(-NOISE / s, x, sigma), X0, tolerance)
    z, scale = diffusion.vp_from_edm(x, sigma)
    close(z, alpha * X0 + beta * NOISE, tolerance)
    close(scale, alpha, tolerance)
    z, time = diffusion.flow_from_edm(x, sigma)
    close(z, (1 - t) * X0 + t * NOISE, tolerance)
    close(time, t, tolerance)
    back, level = diffusion.edm_from_vp(alpha * X0 + beta * NOISE, alpha.flatten())
    close(back, x, 1e-10)
    close(level, s, 1e-9)  # 1 - alpha^2 loses digits at small sigma
    back, level = diffusion.edm_from_flow((1 - t) * X0 + t * NOISE, t.flatten())
    close(back, x, 1e-11)
    close(level, s, 1e-11)


@each_sigma
@pytest.mark.parametrize("name", ["eps", "score", "v", "velocity"])
def test_conversions_round_trip_for_any_prediction(name, sigma):
    x, _ = noised(sigma)
    guess = draw(4, 2, 3, seed=5)
    there, back = getattr(diffusion, f"{name}_from_x0"), getattr(diffusion, f"x0_from_{name}")
    close(back(there(guess, x, sigma), x, sigma), guess, 1e-11)
    close(there(back(guess, x, sigma), x, sigma), guess, 1e-11)


def test_angular_velocity():
    """v = dz/d(angle) along z = cos(angle) x0 + sin(angle) noise, sigma = tan(angle)."""
    angle = torch.tensor(0.6, dtype=torch.float64)
    point = lambda a: a.cos() * X0 + a.sin() * NOISE
    slope = torch.autograd.functional.jacobian(point, angle)
    close(diffusion.v_from_x0(X0, point(angle) / angle.cos(), angle.tan()), slope, 1e-12)


def test_ddim_in_vp_variables_is_euler_in_sigma():
    """DDIM (eta = 0): z' = alpha' x0_hat + sqrt(1 - alpha'^2) eps_hat."""
    gmm = GaussianMixture(draw(3, 2, 3, seed=6), [0.3, 0.2, 0.5])
    sigmas = sigma_grid("cosine", 6, 0.0, 40.0)
    alphas = (1 + sigmas**2).rsqrt()
    z = alphas[0] * 40 * NOISE
    for a, b in zip(alphas, alphas[1:]):
        x, sigma = diffusion.edm_from_vp(z, a)
        x0 = gmm(x, sigma)
        z = b * x0 + (1 - b**2).sqrt() * (z - a * x0) / (1 - a**2).sqrt()
    close(euler(gmm, 40 * NOISE, sigmas), z, 1e-11)


def test_euler_in_flow_variables_is_euler_in_sigma():
    """z' = z + (t' - t) velocity: the same straight step, of constant x0 and noise."""
    gmm = GaussianMixture(draw(3, 2, 3, seed=6), [0.3, 0.2, 0.5])
    sigmas = torch.tensor([9.0, 4.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    z, t = diffusion.flow_from_edm(9 * NOISE, 9.0)
    for sigma, following in zip(sigmas, sigmas[1:]):
        x, _ = diffusion.edm_from_flow(z, t)
        velocity = diffusion.velocity_from_x0(gmm(x, sigma), x, sigma)
        t_next = following / (1 + following)
        z, t = z + (t_next - t) * velocity, t_next
    close(euler(gmm, 9 * NOISE, sigmas), z, 1e-12)


# ------------------------------------------------------------------------ GaussianMixture

MEANS, STDS, WEIGHTS = [-1.1, 0.2, 0.9], [0.15, 0.4, 0.25], [0.5, 0.2, 0.3]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "unequal"])
@pytest.mark.parametrize("sigma", [0.05, 0.6, 5.0])
def test_posterior_mean_is_bayes_by_quadrature(sigma, weights):
    """One dimension: E[x0 | x] and log p(x) as integrals over x0 of p(x0) N(x; x0, sigma^2)."""
    gmm = GaussianMixture([[m] for m in MEANS], STDS, weights)
    prior = lambda x0: sum(
        w * norm.pdf(x0, m, s) for w, m, s in zip(weights or [1 / 3] * 3, MEANS, STDS)
    )
    grid = np.linspace(-6, 6, 60001)
    density = prior(grid)
    for x in (-2.0, -0.4, 0.1, 1.5):
        likelihood = norm.pdf(x, grid, sigma)
        evidence = trapezoid(density * likelihood, grid)
        mean = trapezoid(grid * density * likelihood, grid) / evidence
        close(gmm(torch.tensor([[x]], dtype=torch.float64), sigma), [[mean]], 1e-9)
        log_prob = gmm.log_prob(torch.tensor([[x]], dtype=torch.float64), sigma)
        close(log_prob, [math.log(evidence)], 1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_log_prob_is_a_density(sigma):
    """It integrates to 1; without noise it is the density of the data."""
    gmm = GaussianMixture([[m] for m in MEANS], STDS, WEIGHTS)
    p = lambda x: gmm.log_prob(torch.tensor([[x]], dtype=torch.float64), sigma).exp().item()
    assert abs(quad(p, -12, 12, points=MEANS, limit=500, epsabs=1e-11)[0] - 1) < 1e-9
    expected = sum(
        w * norm.pdf(0.35, m, math.hypot(s, sigma)) for w, m, s in zip(WEIGHTS, MEANS, STDS)
    )
    assert abs(p(0.35) - expected) < 1e-12


@pytest.mark.parametrize("weights", [None, [0.1, 0.65, 0.05, 0.2]], ids=["equal", "unequal"])
def test_posterior_mean_is_bayes_in_twelve_dimensions(weights):
    """scipy's normals; per component m + s^2 (s^2 + sigma^2)^-1 (x - m).

    One noise level for all, or one for each.
    """
    means, stds = draw(4, 3, 2, 2, seed=7), np.array([0.3, 0.1, 0.7, 0.45])
    gmm = GaussianMixture(means, stds, weights)
    x = 0.8 * draw(5, 3, 2, 2, seed=8)
    levels = torch.tensor([0.1, 0.3, 0.5, 1.0, 4.0])
    expected, log_prob = [], []
    for row, sigma in zip(x.flatten(1).numpy(), levels.double().numpy()):
        parts = [
            (w, m, s) for w, m, s in zip(weights or [0.25] * 4, means.flatten(1).numpy(), stds)
        ]
        joint, x0s = [], []
        for w, m, s in parts:
            variance = s**2 + sigma**2
            joint.append(w * multivariate_normal.pdf(row, m, variance * np.eye(12)))
            x0s.append(m + s**2 / variance * (row - m))
        joint, x0s = np.array(joint), np.array(x0s)
        expected.append((joint[:, None] * x0s).sum(0) / joint.sum())
        log_prob.append(math.log(joint.sum()))
    close(gmm(x, levels), torch.from_numpy(np.array(expected)).view_as(x), 1e-12)
    close(gmm.log_prob(x, levels), log_prob, 1e-10)
    alone = torch.cat([gmm(x[i : i + 1], level) for i, level in enumerate(levels)])
    close(alone, gmm(x, levels), 1e-13)
    close(gmm(x, 0.5), gmm(x, torch.full((5,), 0.5)), 1e-13)
    assert gmm(x.float(), levels).dtype == torch.float32
    close(gmm(x.float(), levels), gmm(x.float().double(), levels), 1e-6)


@each_sigma
def test_score_is_the_gradient_of_log_prob(sigma):
    """Tweedie, by autograd: (D - x) / sigma^2 = grad log p(x; sigma)."""
    gmm = GaussianMixture(draw(3, 2, 3, seed=9), [0.3, 0.2, 0.5], [0.6, 0.3, 0.1])
    x = noised(sigma)[0].requires_grad_()
    (score,) = torch.autograd.grad(gmm.log_prob(x, sigma).sum(), x)
    close(diffusion.score_from_x0(gmm(x, sigma), x, sigma), score, 1e-9)


def test_the_denoiser_of_a_mixture_between_its_limits():
    """Without noise: x itself; with noise alone: the data's mean; points: the nearest point."""
    gmm = GaussianMixture(draw(3, 2, 3, seed=9), [0.3, 0.2, 0.5], [0.6, 0.3, 0.1])
    x = draw(4, 2, 3, seed=10)
    close(gmm(x, 0.0), x, 1e-12)
    mean = torch.einsum("k,kij->ij", torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), gmm.means)
    close(gmm(x, 1e7), mean.expand(4, 2, 3), 1e-6)
    points = GaussianMixture(gmm.means, 0.0)
    close(points(gmm.means[[2, 0]] + 0.01, 0.01), gmm.means[[2, 0]], 1e-9)


def test_a_mixture_ignores_labels():
    """So that it stands for an unconditional teacher."""
    gmm = GaussianMixture(draw(3, 2, 3, seed=9), [0.3, 0.2, 0.5], [0.6, 0.3, 0.1])
    x, labels = draw(4, 2, 3, seed=10), torch.tensor([3, 0, 1, 2])
    close(gmm(x, 0.7, labels), gmm(x, 0.7), 0)
    close(with_labels(gmm, labels)(x, 0.7), gmm(x, 0.7), 0)


def test_samples_of_a_mixture():
    """Moments within five standard errors, the share of each component, and the seed."""
    means, n = [[[-3.0, 1.0]], [[2.0, 0.0]], [[5.0, 4.0]]], 40000
    gmm = GaussianMixture(means, [0.1, 0.6, 0.3], WEIGHTS)
    x = gmm.sample(n, torch.Generator().manual_seed(1))
    assert x.shape == (n, 1, 2) and x.dtype == torch.float64
    assert torch.equal(x, gmm.sample(n, torch.Generator().manual_seed(1)))
    assert not torch.equal(x, gmm.sample(n, torch.Generator().manual_seed(2)))
    nearest = (x - gmm.means.view(1, 3, 2)).square().sum(2).argmin(1)
    for k, (w, s) in enumerate(zip(WEIGHTS, [0.1, 0.6, 0.3])):
        rows = x[nearest == k, 0]
        assert abs(len(rows) / n - w) < 5 * math.sqrt(w * (1 - w) / n)
        assert ((rows.mean(0) - gmm.means[k, 0]).abs() < 5 * s / math.sqrt(len(rows))).all()
        assert ((rows.std(0) / s - 1).abs() < 5 / math.sqrt(2 * len(rows))).all()
        assert abs(torch.corrcoef(rows.T)[0, 1]) < 5 / math.sqrt(len(rows))
