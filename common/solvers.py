"""Seven solvers of dx/dsigma = (x - D(x, sigma)) / sigma, all with one signature:

    solver(denoiser, x, sigmas, *, sigmas_net=None, order=..., callback=None) -> x

denoiser    D(x, sigma) -> x0_hat; functools.partial adds labels
x           (B, ...), unit noise times sigmas[0]; the state and the result are float64
sigmas      (N + 1,) the time grid, strictly decreasing, may end in 0: N steps
sigmas_net  (N + 1,) conditioning noise levels, which LD3 learns apart from the grid;
            by default `sigmas`
order       highest order; the first steps of a multistep solver use the history there is
callback    called as callback(i, x) with the state at sigmas[i], i = 0 ... N

The result is the state at sigmas[-1], differentiable in x, sigmas and sigmas_net. Network
evaluations (NFE): N for euler, ipndm, dpmpp, deis and unipc; 2N for heun and dpm2, or
2N - 1 if the grid ends in 0, where their last step is Euler's. UsageError, before the first
evaluation: a grid that does not decrease, an order that the solver does not have.
"""
import numpy as np
import torch

from common import UsageError
from common.diffusion import check_grid, vp_time

ORDERS = {
    "euler": (1,),
    "heun": (2,),
    "ipndm": (1, 2, 3, 4),
    "dpmpp": (1, 2, 3),
    "dpm2": (2,),
    "deis": (1, 2, 3),
    "unipc": (1, 2, 3),
}
TWO_EVALUATIONS = ("heun", "dpm2")  # network evaluations per step; one for the others


def _start(name, order, x, sigmas, sigmas_net, callback):
    """Check the arguments. Return the float64 state, both grids on its device, a callback."""
    if order not in ORDERS[name]:
        offered = ", ".join(map(str, ORDERS[name]))
        raise UsageError(f"--order {order}: {name} offers {offered}")
    # The grids are checked where they are: copying them back from a GPU would wait for it.
    sigmas = check_grid(torch.as_tensor(sigmas, dtype=torch.float64), "sigmas")
    if sigmas_net is None:
        sigmas_net = sigmas
    sigmas_net = torch.as_tensor(sigmas_net, dtype=torch.float64, device=sigmas.device)
    if sigmas_net.shape != sigmas.shape or not (sigmas_net[sigmas > 0] > 0).all():
        raise UsageError(f"sigmas_net: {tuple(sigmas_net.shape)} levels, "
                         f"{tuple(sigmas.shape)} are needed, above 0 where sigmas is")
    x, callback = x.double(), callback or (lambda i, x: None)
    callback(0, x)
    # One copy for both. Towards a GPU it need not be waited for.
    grids = torch.stack([sigmas, sigmas_net]).to(x.device, non_blocking=x.is_cuda)
    return x, *grids, callback


def _above_zero(sigmas):
    """Which noise levels are above 0, on the host: asked in a loop, a GPU is waited for."""
    return (torch.as_tensor(sigmas) > 0).tolist()


def _slope(denoiser, x, sigma):
    """dx/dsigma = eps = (x - D(x, sigma)) / sigma."""
    return (x - denoiser(x, sigma)).div_(sigma)


def _sum(x, weights, terms, ratio=None):
    """ratio x + sum_j weights[j] terms[j], one pass over memory a term: every step is such a sum.

    In place after the first pass: a new tensor takes twice the time.
    """
    first, *others = zip(weights, terms)
    x = torch.addcmul(x, *first) if ratio is None else (ratio * x).addcmul_(*first)
    for weight, term in others:
        x.addcmul_(weight, term)
    return x


# ----------------------------------------------------------------------- one-step solvers

def euler(denoiser, x, sigmas, *, sigmas_net=None, order=1, callback=None):
    """x' = x + (sigma' - sigma) eps: Euler's method in sigma, which is DDIM.

    That is (sigma - sigma') / sigma of the way from x to D(x, sigma). DDIM: Song et al. 2021;
    the equality: DPM-Solver (arXiv 2206.00927), section 3.4.
    """
    x, s, net, callback = _start("euler", order, x, sigmas, sigmas_net, callback)
    for i in range(len(s) - 1):
        x = x.lerp(denoiser(x, net[i]), (s[i] - s[i + 1]) / net[i])
        callback(i + 1, x)
    return x


def heun(denoiser, x, sigmas, *, sigmas_net=None, order=2, callback=None):
    """x' = x + (sigma' - sigma) (eps + eps') / 2, with eps' taken after an Euler step.

    EDM's sampler without churn (Karras et al. 2022, Alg. 1). A step to sigma = 0 is Euler's.
    """
    x, s, net, callback = _start("heun", order, x, sigmas, sigmas_net, callback)
    above_zero = _above_zero(sigmas)
    for i, h in enumerate(s.diff()):
        slope = _slope(denoiser, x, net[i])
        if above_zero[i + 1]:
            x_euler = (h * slope).add_(x)
            slope, h = _slope(denoiser, x_euler, net[i + 1]).add_(slope), h / 2
        x = (h * slope).add_(x)
        callback(i + 1, x)
    return x


def dpm2(denoiser, x, sigmas, *, sigmas_net=None, order=2, callback=None):
    """x' = x + (sigma' - sigma) eps(middle), sigma_middle = sqrt(sigma sigma').

    DPM-Solver-2, singlestep (Lu et al. 2022, arXiv 2206.00927, Alg. 1, r1 = 1/2): the
    midpoint rule with the midpoint in lambda. The conditioning noise level there is the
    geometric mean of sigmas_net's two. A step to sigma = 0 is Euler's.
    """
    x, s, net, callback = _start("dpm2", order, x, sigmas, sigmas_net, callback)
    above_zero = _above_zero(sigmas)
    for i in range(len(s) - 1):
        slope = _slope(denoiser, x, net[i])
        if above_zero[i + 1]:
            middle = torch.addcmul(x, (s[i] * s[i + 1]).sqrt() - s[i], slope)
            slope = _slope(denoiser, middle, (net[i] * net[i + 1]).sqrt())
        x = torch.addcmul(x, s[i + 1] - s[i], slope)
        callback(i + 1, x)
    return x


# ---------------------------------------------------------------- multistep solvers in eps

ADAMS_BASHFORTH = {
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm(denoiser, x, sigmas, *, sigmas_net=None, order=4, callback=None):
    """x' = x + (sigma' - sigma) sum_j c_j eps_j, c the Adams-Bashforth coefficients.

    iPNDM (Zhang & Chen 2022, arXiv 2204.13902): those of a *uniform* grid, on any grid.
    """
    x, s, net, callback = _start("ipndm", order, x, sigmas, sigmas_net, callback)
    slopes = []  # newest first
    for i, h in enumerate(s.diff()):
        slopes = [_slope(denoiser, x, net[i]), *slopes[: order - 1]]
        weights = [h * c for c in ADAMS_BASHFORTH[len(slopes)]]
        x = _sum(x, weights, slopes)
        callback(i + 1, x)
    return x


_NODES, _WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(48))  # on [-1, 1]


def deis(denoiser, x, sigmas, *, sigmas_net=None, order=3, callback=None):
    """x' = x + sum_j eps_j integral l_j(t(sigma)) dsigma, l_j Lagrange polynomials in VP time.

    tAB-DEIS (Zhang & Chen 2022, arXiv 2204.13902, Eq. 14-15), whose semilinear part vanishes
    in our variables. Gauss-Legendre with 48 nodes a step. `order` is the polynomials' degree,
    as in the paper's names: degree 1 uses two evaluations, as AB2 does.
    """
    x, s, net, callback = _start("deis", order, x, sigmas, sigmas_net, callback)
    nodes, weights = _NODES.to(x.device), _WEIGHTS.to(x.device)
    t = vp_time(s)
    slopes, times = [], []  # newest first
    for i in range(len(s) - 1):
        slopes = [_slope(denoiser, x, net[i]), *slopes[:order]]
        times = [t[i], *times[:order]]
        half = (s[i + 1] - s[i]) / 2
        tau = vp_time((s[i] + s[i + 1]) / 2 + half * nodes)  # (48,)
        integrals = []  # of the Lagrange polynomials
        for j in range(len(times)):
            lagrange = half * weights
            for k in range(len(times)):
                if k != j:
                    lagrange = lagrange * (tau - times[k]) / (times[j] - times[k])
            integrals.append(lagrange.sum())
        x = _sum(x, integrals, slopes)
        callback(i + 1, x)
    return x


# ----------------------------------------------------------------- multistep solvers in x0

def dpmpp(denoiser, x, sigmas, *, sigmas_net=None, order=3, callback=None):
    """x' = (sigma' / sigma) x + sigma' integral e^lambda x0(lambda) dlambda, x0 extrapolated.

    DPM-Solver++, multistep (Lu et al. 2022, arXiv 2211.01095): x0 as a polynomial in lambda.
    The order falls to 1 at the end.

    Order 3 has half of the second-derivative term of Taylor's formula, as in the paper's
    code, LD3's and diffusers': its error is of second order, with a small constant. Kept,
    because every published "3M" number was made this way.
    """
    x, s, net, callback = _start("dpmpp", order, x, sigmas, sigmas_net, callback)
    lam = -s[:-1].log()  # without the last: at sigma = 0 its gradient would be NaN
    new, old, oldest = torch.eye(3, dtype=s.dtype, device=s.device)  # for x0s: gives weights
    x0s = []  # newest first
    n = len(s) - 1
    for i in range(n):
        x0s = [denoiser(x, net[i]), *x0s[: order - 1]]
        k = min(len(x0s), n - i)
        ratio = s[i + 1] / s[i]
        phi1 = ratio - 1  # expm1(-h), finite even in a step to sigma = 0
        weights = -phi1 * new
        if k > 1:
            h, h1 = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
            d1 = (new - old) * h / h1
            if k == 2:
                weights = weights - phi1 / 2 * d1
            else:
                h2 = lam[i - 1] - lam[i - 2]
                d1_old = (old - oldest) * h / h2
                d2 = (d1 - d1_old) * h / (h1 + h2)
                d1 = d1 + (d1 - d1_old) * h1 / (h1 + h2)
                phi2 = phi1 / h + 1
                weights = weights + phi2 * d1 - (phi2 / h - 0.5) * d2
        x = _sum(x, weights[:k], x0s, ratio)
        callback(i + 1, x)
    return x


def _unipc_weights(r, hh):
    """The k weights B(h) rho, where sum_j rho_j r_j^(i-1) = b_i, i = 1 ... k (UniPC, Eq. 8).

    b_i contains 1 / B(h), so B(h) cancels. rho_j is the Lagrange polynomial of r_j with b_i in
    place of r^(i-1): a factor (r - r_m) turns the list b into b_{i+1} - r_m b_i.
    """
    phi, factorial, b = torch.expm1(hh) / hh - 1, 1, []
    for i in range(1, len(r) + 1):
        b.append(phi * factorial)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    weights = []
    for j in range(len(r)):
        rho = b
        for m in range(len(r)):
            if m != j:
                rho = [(b2 - r[m] * b1) / (r[j] - r[m]) for b1, b2 in zip(rho, rho[1:])]
        weights.append(rho[0])
    return weights


def _unipc_sum(x, x0s, ratio, weights, r):
    """ratio x + (1 - ratio) x0s[0] - sum_j weights_j (x0s[j] - x0s[0]) / r_j."""
    parts = [-weight / r_j for weight, r_j in zip(weights, r)]
    return _sum(x, [1 - ratio - sum(parts), *parts], x0s, ratio)


def unipc(denoiser, x, sigmas, *, sigmas_net=None, order=3, variant="bh1", callback=None):
    """x' = (sigma' / sigma) x - (sigma' / sigma - 1) x0 - B(h) sum_j rho_j D_j / r_j.

    D_j is x0 at another node minus the newest x0, r_j its distance in lambda over h.
    UniPC (Zhao et al. 2023, arXiv 2302.04867), multistep, x0-prediction: the predictor UniP-k,
    then the corrector UniC-k, which reuses the evaluation that the next step needs anyway.
    The order falls to 1 at the end and the last step is not corrected: N evaluations.

    As in the authors' code, a predictor of order 2 and a corrector of order 1 use rho = 1/2
    instead of the solution. Only there does the variant matter: B(h) = h or e^h - 1. LD3's
    code detaches the ratios r; here gradients flow through all coefficients.
    """
    x, s, net, callback = _start("unipc", order, x, sigmas, sigmas_net, callback)
    if variant not in ("bh1", "bh2"):
        raise UsageError(f"unipc variant {variant}: choose bh1 or bh2")
    lam = -s[:-1].log()  # as in dpmpp
    n = len(s) - 1
    x0s = [denoiser(x, net[0])]  # newest first
    for i in range(n):
        k = min(i + 1, order, n - i)
        ratio = s[i + 1] / s[i]
        hh = lam[i] - lam[min(i + 1, n - 1)]  # not used in the last step
        r = [(lam[i - j] - lam[i]) / -hh for j in range(1, k)]
        half = (hh if variant == "bh1" else torch.expm1(hh)) / 2
        weights = [] if k == 1 else [half] if k == 2 else _unipc_weights(r, hh)
        x_next = _unipc_sum(x, x0s, ratio, weights, r)
        if i + 1 < n:
            x0_new, r = denoiser(x_next, net[i + 1]), [*r, torch.ones_like(hh)]
            weights = [half] if k == 1 else _unipc_weights(r, hh)
            x_next = _unipc_sum(x, [*x0s[:k], x0_new], ratio, weights, r)
            x0s = [x0_new, *x0s[: order - 1]]
        x = x_next
        callback(i + 1, x)
    return x


SOLVERS = {f.__name__: f for f in (euler, heun, ipndm, dpmpp, dpm2, deis, unipc)}


def steps_for(solver, nfe, ends_in_zero=False):
    """The number of steps in which `solver` (a name) makes exactly `nfe` network evaluations.

    UsageError: an unknown solver, nfe < 1, or a count that two evaluations a step cannot give.
    """
    if solver not in SOLVERS:
        raise UsageError(f"--solver {solver}: unknown, choose one of {', '.join(SOLVERS)}")
    if nfe < 1:
        raise UsageError(f"--nfe {nfe}: at least 1 network evaluation is needed")
    if solver not in TWO_EVALUATIONS:
        return nfe
    if (nfe + ends_in_zero) % 2:
        last = ", one in the last" if ends_in_zero else ""
        fewer = f"{nfe - 1} or " if nfe > 1 else ""
        raise UsageError(f"--nfe {nfe}: {solver} takes two evaluations a step{last}; "
                         f"choose {fewer}{nfe + 1}")
    return (nfe + ends_in_zero) // 2
