"""One notation for six papers: noise levels sigma, a denoiser D, and conversions.

    x = x0 + sigma * noise                    an image x0 at noise level sigma
    D(x, sigma) -> x0_hat                     a denoiser
    dx/dsigma = (x - D(x, sigma)) / sigma     the probability-flow ODE

The papers' own variables are one substitution away:

    VP / DDPM       z = x / sqrt(1 + sigma^2), alpha = 1 / sqrt(1 + sigma^2)
                    cosine time: sigma = tan(pi t / 2)
    rectified flow  z = x / (1 + sigma), t = sigma / (1 + sigma), velocity = noise - x0
    half-logSNR     lambda = -log sigma
"""
import math
from functools import partial

import torch
from torch import nn

from common import UsageError


def expand(sigma, x):
    """`sigma`, a number or a tensor () or (B,), in x's dtype, to broadcast against x (B, ...)."""
    if not isinstance(sigma, torch.Tensor):
        sigma = x.new_full((), sigma)  # a number: nothing is copied to a GPU
    sigma = sigma.to(x.device, x.dtype)
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), with F a raw network.

    EDM's preconditioning (Karras et al. 2022, Table 1) for data in [-1, 1] whose standard
    deviation is sigma_data. x (B, C, H, W); sigma a number, () or (B,); labels are class
    indices (B,) or one-hot rows (B, label_dim). -> (B, C, H, W), in x's dtype.

    It computes in float32, or in float64 if the network's parameters are float64.
    """

    def __init__(self, net, sigma_data=0.5):
        super().__init__()
        self.model = net  # parameter names in public EDM checkpoints begin with 'model'
        self.sigma_data = sigma_data

    @property
    def net(self):
        return self.model

    def coefficients(self, sigma):
        """c_skip, c_out, c_in at the noise levels sigma."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / total**2
        c_out = sigma * self.sigma_data / total
        return c_skip, c_out, 1 / total

    def forward(self, x, sigma, labels=None, augment_labels=None):
        double = next(self.model.parameters()).dtype == torch.float64
        z = x.to(torch.float64 if double else torch.float32)
        sigma = expand(sigma, z)  # (B or 1, 1, 1, 1)
        c_skip, c_out, c_in = self.coefficients(sigma)
        tiny = torch.finfo(sigma.dtype).tiny  # D(x, 0) is x: c_out is 0, the network must be finite
        c_noise = (sigma.clamp(min=tiny).log() / 4).flatten().expand(len(z))  # (B,)
        f = self.model(c_in * z, c_noise, labels, augment_labels)  # (B, C, H, W)
        return (c_skip * z + c_out * f.to(z.dtype)).to(x.dtype)


def with_labels(denoiser, labels):
    """The denoiser as a function of (x, sigma), its labels (B,) fixed; unchanged for None."""
    return denoiser if labels is None else partial(denoiser, labels=labels)


# ---------------------------------------------------------------------------------- noise

def noise_from_seeds(seeds, shape, device="cpu"):
    """Unit Gaussian noise (len(seeds), *shape), float64; image k depends on seeds[k] alone.

    One generator per image (as in EDM's generate.py): the batch size, the device and the
    number of ranks change nothing. Drawn in float32 on the CPU. Seeds count modulo 2^32.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows).to(device, torch.float64)


# ----------------------------------------------------------------------------- time grids

GRIDS = ("uniform", "quadratic", "logsnr", "edm", "cosine", "vp")


def vp_time(sigma, beta_min=0.1, beta_d=19.9):
    """t of the linear-beta VP process at noise level sigma (EDM, Table 1, inverted)."""
    root = (beta_min**2 + 2 * beta_d * torch.log1p(sigma**2)).sqrt()
    return (root - beta_min) / beta_d


def vp_sigma(t, beta_min=0.1, beta_d=19.9):
    """The noise level of the linear-beta VP process at time t: the inverse of vp_time."""
    return torch.expm1(beta_d / 2 * t**2 + beta_min * t).sqrt()


def sigma_grid(kind, n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """A hand-made time grid of n steps: (n + 1,) float64, from sigma_max down to sigma_min.

        uniform    even in sigma
        quadratic  sigma_min + (sigma_max - sigma_min) u^2, u even from 1 to 0
        logsnr     even in lambda = -log sigma
        edm        even in sigma^(1/rho) (EDM, Eq. 5)
        cosine     even in t, sigma = tan(pi t / 2), clipped at both ends (PD, section 2)
        vp         even in the time t of the linear-beta VP process, from t(sigma_max) to
                   t(sigma_min): DDPM's time steps (Ho et al. 2020; diffusers' default)

    sigma_min = 0 is allowed, except for logsnr. EDM's own sampler uses
    sigma_grid("edm", n - 1) followed by 0. UsageError: an unknown kind, n < 1, or noise
    levels that do not decrease.
    """
    if kind not in GRIDS:
        raise UsageError(f"time grid {kind}: unknown, choose one of {', '.join(GRIDS)}")
    if n < 1:
        raise UsageError(f"time grid with {n} steps: at least 1 is needed")
    allowed = sigma_min > 0 or (sigma_min == 0 and kind != "logsnr")
    if not (allowed and sigma_min < sigma_max < math.inf):
        raise UsageError(f"{kind} time grid from sigma {sigma_max} to {sigma_min}: "
                         "the levels must decrease and be finite")
    u = torch.linspace(1, 0, n + 1, dtype=torch.float64)  # 1 at the noisy end
    if kind == "uniform":
        sigmas = sigma_min + (sigma_max - sigma_min) * u
    elif kind == "quadratic":
        sigmas = sigma_min + (sigma_max - sigma_min) * u**2
    elif kind == "logsnr":
        sigmas = torch.exp(math.log(sigma_min) + math.log(sigma_max / sigma_min) * u)
    elif kind == "edm":
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        sigmas = (low + (high - low) * u) ** rho
    elif kind == "cosine":
        sigmas = torch.tan(math.pi / 2 * u).clamp(sigma_min, sigma_max)
    else:
        low, high = vp_time(torch.tensor([sigma_min, sigma_max], dtype=torch.float64))
        sigmas = vp_sigma(low + (high - low) * u)
    sigmas[0], sigmas[-1] = sigma_max, sigma_min  # exact, whatever the rounding
    return check_grid(sigmas, f"{kind} time grid with {n} steps")


def stage_levels(n, sigma_max):
    """The steps of PD's n-step student: (m, 3) rows of noise levels sigma > sigma' > sigma''.

    sigma = tan(pi t / 2) at t = i/n, (i - 1/2)/n, (i - 1)/n for i = n ... 1: the cosine grid,
    cut off at sigma_max and ending at 0. One step of the student goes from sigma to sigma'',
    two steps of its teacher pass through sigma'. Where the cut-off makes a step of length 0, the
    step is left out, so m <= n.
    """
    t = torch.linspace(1, 0, 2 * n + 1, dtype=torch.float64)
    sigmas = torch.tan(torch.pi / 2 * t).clamp(max=sigma_max)
    sigmas[0] = sigma_max  # tan(pi / 2) in floating point
    rows = torch.stack([sigmas[:-2:2], sigmas[1::2], sigmas[2::2]], 1)
    return rows[rows[:, 0] > rows[:, 2]]


def ddim_levels(n, sigma_max):
    """The time grid of PD's n-step student, (m + 1,): from sigma_max to 0."""
    sigmas = stage_levels(n, sigma_max)[:, 0]
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def check_grid(sigmas, what):
    """Return `sigmas` if they are a time grid: (N + 1,), finite, strictly decreasing, >= 0.

    N is at least 1. Otherwise UsageError, with `what` as the grid's name.
    """
    values = sigmas.detach().double().cpu()
    valid = values.ndim == 1 and len(values) >= 2 and torch.isfinite(values).all()
    if not (valid and values[-1] >= 0 and (values[1:] < values[:-1]).all()):
        shown = [round(v, 6) for v in values.flatten()[:30].tolist()]
        raise UsageError(f"{what}: {shown} is not a strictly decreasing list of levels >= 0")
    return sigmas


# ---------------------------------------------------------------------------- conversions
# What a network predicts, and the variables it sees. Throughout: x = x0 + sigma * noise and
# alpha = 1 / sqrt(1 + sigma^2), the VP signal level; VP's noise level is alpha * sigma.

def eps_from_x0(x0, x, sigma):
    """The noise eps = (x - x0) / sigma, which is also dx/dsigma."""
    return (x - x0) / expand(sigma, x)


def x0_from_eps(eps, x, sigma):
    return x - expand(sigma, x) * eps


def score_from_x0(x0, x, sigma):
    """grad log p(x; sigma) = (x0 - x) / sigma^2 (Tweedie)."""
    return (x0 - x) / expand(sigma, x) ** 2


def x0_from_score(score, x, sigma):
    return x + expand(sigma, x) ** 2 * score


def v_from_x0(x0, x, sigma):
    """v = alpha eps - (alpha sigma) x0 (PD: Salimans & Ho 2022, section 4)."""
    sigma = expand(sigma, x)
    return ((x - x0) / sigma - sigma * x0) / (1 + sigma**2).sqrt()


def x0_from_v(v, x, sigma):
    """x0 = alpha z - (alpha sigma) v, with z = alpha x."""
    sigma = expand(sigma, x)
    return x / (1 + sigma**2) - sigma / (1 + sigma**2).sqrt() * v


def velocity_from_x0(x0, x, sigma):
    """Rectified flow's velocity = noise - x0."""
    return eps_from_x0(x0, x, sigma) - x0


def x0_from_velocity(velocity, x, sigma):
    """x0 = z - t velocity = (x - sigma velocity) / (1 + sigma)."""
    sigma = expand(sigma, x)
    return (x - sigma * velocity) / (1 + sigma)


def vp_from_edm(x, sigma):
    """(z, alpha) of VP: z = alpha x = alpha x0 + sqrt(1 - alpha^2) noise."""
    alpha = (1 + expand(sigma, x) ** 2).rsqrt()
    return alpha * x, alpha


def edm_from_vp(z, alpha):
    """(x, sigma) from VP: x = z / alpha, sigma = sqrt(1 - alpha^2) / alpha."""
    alpha = expand(alpha, z)
    return z / alpha, (1 - alpha**2).sqrt() / alpha


def flow_from_edm(x, sigma):
    """(z, t) of rectified flow: z = (1 - t) x0 + t noise, t = sigma / (1 + sigma)."""
    sigma = expand(sigma, x)
    return x / (1 + sigma), sigma / (1 + sigma)


def edm_from_flow(z, t):
    """(x, sigma) from rectified flow, t < 1: x = z / (1 - t), sigma = t / (1 - t)."""
    t = expand(t, z)
    return z / (1 - t), t / (1 - t)


class FlowDenoiser(Denoiser):
    """A rectified flow is a denoiser too: D(x, sigma) = (x - sigma v(z, t)) / (1 + sigma).

    z, t = flow_from_edm(x, sigma); v: a raw network conditioned on t, as cud.py trains. phi:
    ShakeDrop's share of the decoder at t = 0, or None (see cud.py).
    """

    def __init__(self, net, phi=None):
        super().__init__(net)
        self.phi = phi

    def forward(self, x, sigma, labels=None, augment_labels=None):
        z, t = flow_from_edm(x, sigma)
        dtype = next(self.model.parameters()).dtype
        t = t.flatten().expand(len(x)).to(dtype)  # (B,)
        balance = None if self.phi is None else t * (1 - 2 * self.phi) + self.phi
        v = self.model(z.to(dtype), t, labels, balance=balance)
        return x0_from_velocity(v.to(x.dtype), x, expand(sigma, x))


# --------------------------------------------------------------------- the exact denoiser

class GaussianMixture(nn.Module):
    """p(x0) = sum_k w_k N(x0; m_k, s_k^2), whose denoiser E[x0 | x] has a closed form:

        D(x, sigma) = sum_k p(k | x) (m_k sigma^2 + x s_k^2) / (s_k^2 + sigma^2)

    means (K, *shape); stds (K,) or one number; weights (K,) that sum to 1, equal by default.
    The exact reference of tests and notebooks. It computes in float64.
    """

    def __init__(self, means, stds, weights=None):
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float64)
        stds = torch.as_tensor(stds, dtype=torch.float64)
        weights = [1 / len(means)] * len(means) if weights is None else weights
        self.register_buffer("means", means)
        self.register_buffer("stds", stds.expand(len(means)))
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float64))

    def _log_joint(self, x, sigma):
        """log w_k N(x; m_k, variance_k), variance_k = s_k^2 + sigma^2: both (B, K); x (B, D)."""
        variance = self.stds**2 + expand(sigma, x) ** 2  # (B or 1, K)
        distance = (x[:, None] - self.means.flatten(1)).square().sum(2)  # (B, K)
        d = x.shape[1]
        log_joint = (self.weights.log() - distance / (2 * variance)
                     - d / 2 * (2 * math.pi * variance).log())
        return log_joint, variance

    def forward(self, x, sigma, labels=None):
        """E[x0 | x] for x (B, *shape), in x's dtype; labels are ignored."""
        flat = x.double().flatten(1)  # (B, D)
        log_joint, variance = self._log_joint(flat, sigma)
        w = log_joint.softmax(1) / variance  # (B, K)
        from_means = expand(sigma, flat) ** 2 * (w @ self.means.flatten(1))  # (B, D)
        x0 = from_means + flat * (w @ self.stds**2)[:, None]
        return x0.view(x.shape).to(x.dtype)

    def log_prob(self, x, sigma=0.0):
        """log p(x; sigma): the log density (B,) of the data plus noise of level sigma."""
        return self._log_joint(x.double().flatten(1), sigma)[0].logsumexp(1).to(x.dtype)

    def sample(self, n, generator=None):
        """n draws of x0: (n, *shape), float64."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        shape = (n, *self.means.shape[1:])
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        return self.means[k] + expand(self.stds[k], noise) * noise
