"""One notation for six papers: x = x0 + sigma * noise, a denoiser D(x, sigma) -> x0_hat, dx/dsigma = (x - D(x, sigma)) / sigma.

The papers' own letters are one substitution away:
    VP / DDPM       z = x / sqrt(1 + sigma^2),  alpha = 1 / sqrt(1 + sigma^2);  cosine time: sigma = tan(pi t / 2)
    rectified flow  z = x / (1 + sigma),        t = sigma / (1 + sigma);        velocity = noise - x0
    half-logSNR     lambda = -log sigma
"""
import math
from functools import partial

import torch
from torch import nn

from common.training import UsageError


def expand(sigma, x):
    """`sigma`, a number or a tensor of shape () or (B,), as a tensor of x's dtype that broadcasts against x (B, ...)."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): EDM's preconditioning (Karras et al. 2022, Table 1) around a raw network F.

    x is (B, C, H, W) at noise level sigma (standard deviation, data in [-1, 1]); sigma a number, () or (B,). labels are (B,) class
    indices or (B, label_dim) one-hot rows. The arithmetic is float32, float64 only if the network's parameters are; the result has
    x's dtype, so a solver's float64 state stays float64.
    """

    def __init__(self, net, sigma_data=0.5):
        super().__init__()
        self.model = net  # 'model' and not 'net': the names in public EDM checkpoints begin with it
        self.sigma_data = sigma_data

    @property
    def net(self):
        return self.model

    def coefficients(self, sigma):
        """c_skip, c_out, c_in at the levels sigma."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return self.sigma_data**2 / total**2, sigma * self.sigma_data / total, 1 / total

    def forward(self, x, sigma, labels=None, augment_labels=None):
        dtype = torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32
        z = x.to(dtype)
        sigma = expand(sigma, z)  # (B or 1, 1, 1, 1)
        c_skip, c_out, c_in = self.coefficients(sigma)
        c_noise = (sigma.log() / 4).flatten().expand(len(z))  # (B,)
        f = self.model(c_in * z, c_noise, labels, augment_labels)  # (B, C, H, W)
        return (c_skip * z + c_out * f.to(dtype)).to(x.dtype)


def with_labels(denoiser, labels):
    """The denoiser as a function of (x, sigma) alone, with labels (B,) filled in; as it is if they are None."""
    return denoiser if labels is None else partial(denoiser, labels=labels)


# -------------------------------------------------------------------------------------------------------------------- time grids

GRIDS = ("uniform", "quadratic", "logsnr", "edm", "cosine")


def sigma_grid(kind, n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """A hand-made grid: (n + 1,) float64, decreasing from sigma_max to sigma_min, for n steps.

    uniform and quadratic: in sigma (the second as sigma_min + (k/n)^2 of the range); logsnr: uniform in lambda = -log sigma;
    edm: uniform in sigma^(1/rho) (EDM, Eq. 5); cosine: uniform in t with sigma = tan(pi t / 2), cut off at both ends (PD, section 2).
    sigma_min = 0 is allowed, except for logsnr. EDM's own sampler uses sigma_grid("edm", n - 1) followed by 0.
    Raises UsageError for an unknown kind, n < 1 or levels that do not decrease.
    """
    if kind not in GRIDS:
        raise UsageError(f"time grid {kind}: unknown, choose one of {', '.join(GRIDS)}")
    if n < 1:
        raise UsageError(f"time grid with {n} steps: at least 1 is needed")
    if not (0 < sigma_min < sigma_max or (sigma_min == 0 < sigma_max and kind != "logsnr")) or not math.isfinite(sigma_max):
        raise UsageError(f"{kind} time grid from sigma {sigma_max} to {sigma_min}: the levels must decrease and be finite")
    u = torch.linspace(1, 0, n + 1, dtype=torch.float64)  # 1 at the noisy end
    if kind == "uniform":
        sigmas = sigma_min + (sigma_max - sigma_min) * u
    elif kind == "quadratic":
        sigmas = sigma_min + (sigma_max - sigma_min) * u**2
    elif kind == "logsnr":
        sigmas = torch.exp(math.log(sigma_min) + math.log(sigma_max / sigma_min) * u)
    elif kind == "edm":
        sigmas = (sigma_min ** (1 / rho) + (sigma_max ** (1 / rho) - sigma_min ** (1 / rho)) * u) ** rho
    else:
        sigmas = torch.tan(math.pi / 2 * u).clamp(sigma_min, sigma_max)
    sigmas[0], sigmas[-1] = sigma_max, sigma_min  # exact ends, whatever the rounding (tan(pi / 2) is huge, and negative in float32)
    return check_grid(sigmas, f"{kind} time grid with {n} steps")


def check_grid(sigmas, what):
    """Return `sigmas`; UsageError unless it is a 1-D grid of at least two finite levels that decrease strictly and end at >= 0."""
    values = sigmas.detach().double().cpu()
    if values.ndim != 1 or len(values) < 2 or not torch.isfinite(values).all() or values[-1] < 0 or not (values[1:] < values[:-1]).all():
        raise UsageError(f"{what}: {[round(v, 6) for v in values.flatten().tolist()]} is not a strictly decreasing list of levels >= 0")
    return sigmas


# --------------------------------------------------------------- conversions: what a network may predict, and whose variables it sees
# Throughout: x = x0 + sigma * noise, with alpha = 1 / sqrt(1 + sigma^2) the VP signal level, so that VP's noise level is alpha * sigma.

def eps_from_x0(x0, x, sigma):
    """The noise: eps = (x - x0) / sigma. It is also dx/dsigma."""
    return (x - x0) / expand(sigma, x)


def x0_from_eps(eps, x, sigma):
    return x - expand(sigma, x) * eps


def score_from_x0(x0, x, sigma):
    """grad log p(x; sigma) = (x0 - x) / sigma^2 (Tweedie)."""
    return (x0 - x) / expand(sigma, x) ** 2


def x0_from_score(score, x, sigma):
    return x + expand(sigma, x) ** 2 * score


def v_from_x0(x0, x, sigma):
    """PD's v = alpha eps - (alpha sigma) x0 (Salimans & Ho, section 4), from EDM's x."""
    sigma = expand(sigma, x)
    return ((x - x0) / sigma - sigma * x0) / (1 + sigma**2).sqrt()


def x0_from_v(v, x, sigma):
    """x0 = alpha z - (alpha sigma) v with z = alpha x."""
    sigma = expand(sigma, x)
    return x / (1 + sigma**2) - sigma / (1 + sigma**2).sqrt() * v


def velocity_from_x0(x0, x, sigma):
    """Rectified flow's velocity noise - x0."""
    return eps_from_x0(x0, x, sigma) - x0


def x0_from_velocity(velocity, x, sigma):
    """x0 = z - t velocity = (x - sigma velocity) / (1 + sigma)."""
    sigma = expand(sigma, x)
    return (x - sigma * velocity) / (1 + sigma)


def vp_from_edm(x, sigma):
    """(z, alpha): the same point in VP variables, z = alpha x0 + sqrt(1 - alpha^2) noise; alpha broadcasts against z."""
    alpha = (1 + expand(sigma, x) ** 2).rsqrt()
    return alpha * x, alpha


def edm_from_vp(z, alpha):
    """(x, sigma) from VP variables: x = z / alpha, sigma = sqrt(1 - alpha^2) / alpha."""
    alpha = expand(alpha, z)
    return z / alpha, (1 - alpha**2).sqrt() / alpha


def flow_from_edm(x, sigma):
    """(z, t): the same point in rectified flow's variables, z = (1 - t) x0 + t noise; t broadcasts against z."""
    sigma = expand(sigma, x)
    return x / (1 + sigma), sigma / (1 + sigma)


def edm_from_flow(z, t):
    """(x, sigma) from rectified flow's variables, t < 1: x = z / (1 - t), sigma = t / (1 - t)."""
    t = expand(t, z)
    return z / (1 - t), t / (1 - t)


# ------------------------------------------------------------------------------------------------------------- the exact denoiser

class GaussianMixture(nn.Module):
    """Data whose denoiser is known in closed form: the oracle of tests and notebooks.

    means (K, *shape), stds (K,), weights (K,) summing to 1 (equal by default). Called as (x, sigma) -> E[x0 | x], with x (B, *shape):
    each component answers (m_k sigma^2 + x s_k^2) / (s_k^2 + sigma^2), weighted by its posterior. Computed in float64, returned in
    x's dtype.
    """

    def __init__(self, means, stds, weights=None):
        super().__init__()
        means, stds = torch.as_tensor(means, dtype=torch.float64), torch.as_tensor(stds, dtype=torch.float64)
        weights = [1 / len(means)] * len(means) if weights is None else weights
        self.register_buffer("means", means)
        self.register_buffer("stds", stds.expand(len(means)))
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float64))

    def _log_joint(self, x, sigma):
        """log of weight_k N(x; m_k, s_k^2 + sigma^2), and that variance, both (B, K); x is (B, D)."""
        variance = self.stds**2 + expand(sigma, x) ** 2  # (B or 1, K)
        distance = (x[:, None] - self.means.flatten(1)).square().sum(2)  # (B, K)
        d = x.shape[1]
        return self.weights.log() - distance / (2 * variance) - d / 2 * (2 * math.pi * variance).log(), variance

    def forward(self, x, sigma):
        flat = x.double().flatten(1)  # (B, D)
        log_joint, variance = self._log_joint(flat, sigma)
        w = log_joint.softmax(1) / variance  # (B, K)
        x0 = expand(sigma, flat) ** 2 * (w @ self.means.flatten(1)) + flat * (w @ self.stds**2)[:, None]
        return x0.view(x.shape).to(x.dtype)

    def log_prob(self, x, sigma=0.0):
        """log density (B,) of the data smoothed with noise of level sigma."""
        return self._log_joint(x.double().flatten(1), sigma)[0].logsumexp(1).to(x.dtype)

    def sample(self, n, generator=None):
        """n draws of x0, (n, *shape), float64."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.means.shape[1:], dtype=torch.float64, generator=generator)
        return self.means[k] + expand(self.stds[k], noise) * noise
