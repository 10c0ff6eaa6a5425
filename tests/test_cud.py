"""cud.py against the official code's numbers (golden/README.md, 6), closed forms and itself."""

import copy
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cud
from common import UsageError, baselines
from common.baselines import best_untrained, solver_name, untrained_samplers
from common.datasets import Stream, load_dataset
from common.diffusion import GaussianMixture, edm_from_flow, expand, noise_from_seeds, sigma_grid
from common.fid import make_evaluator, measure
from common.machinery.run import Run
from common.solvers import SOLVERS
from common.teacher import load_teacher
from common.unet import ddpmpp
from scripts import EVERYWHERE, assert_refused, differences, results, run_script, watch

ROOT = Path(__file__).parent.parent
GOLDEN = np.load(ROOT / "tests" / "golden" / "cud.npz")
CONFIG = json.loads(str(GOLDEN["config"]))
NOTEBOOK = json.loads((ROOT / "notebooks" / "5_cud.ipynb").read_text(encoding="utf-8"))
TINY = dict(
    tn=16, adaptive_weight=False, model_channels=8, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(), encoder_channels=8, batch_size=4, warmup=2, device="cpu",
    distill_steps=0, distill_n=6, eval_batch=4, sampler=("euler/even",),
)  # fmt: skip


def golden(key):
    return torch.as_tensor(GOLDEN[key])


def from_notebook(name):
    """A function that only the notebook has: its cell is executed."""
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    names = {"cud": cud, "torch": torch, "expand": expand}
    exec(next(cell for cell in cells if f"def {name}(" in cell), names)
    return names[name]


def official_step(rule, t, u, tn):
    """h (B,) by the official --step-rule. cud.py has the first, the others serve the goldens."""
    return {"uniform": u, "rule": t, "origin": torch.ones_like(u)}[rule] / tn


class GoldenVelocity(nn.Module):
    """The analytic net of the goldens: up to three heads on one layer of features."""

    def __init__(self):
        super().__init__()
        names = ("W1", "u", "b1", "W2", "b2", "V2", "c2", "V3", "c3")
        self.w = nn.ParameterDict({name: golden(f"w/{name}").clone() for name in names})

    def forward(self, z, t, heads=1):
        w = self.w
        t = torch.as_tensor(t, dtype=z.dtype).expand(len(z))
        f = torch.tanh(z.flatten(1) @ w.W1 + t[:, None] * w.u + w.b1)
        first = (f @ w.W2 + w.b2).view_as(z) + 0.3 * z
        return torch.stack(
            [first, (f @ w.V2 + w.c2).view_as(z), (f @ w.V3 + w.c3).view_as(z)][:heads]
        )


# ---------------------------------------------------------------- the official numbers


@pytest.mark.parametrize("case", CONFIG["runs"], ids=lambda c: c["key"])
def test_predictions_targets_and_losses_are_the_official_ones(case):
    key, heads, velocity = case["key"], case["pred_step"], GoldenVelocity()
    x0, z1, t = golden("x"), golden("z"), golden(f"{key}/t")
    if case["t_mode"] == "random":
        torch.testing.assert_close(
            golden(f"{key}/u_t") * (1 - cud.EPS) + cud.EPS, t, rtol=0, atol=0
        )
    u = golden(f"{key}/u_dt") if f"{key}/u_dt" in GOLDEN else torch.zeros(len(t))
    h = official_step(case["adapt_cu"], t, u, case["TN"])
    # t is float32 in half of the cases, and so is their 1 - t
    z = expand(1 - t, x0) * x0 + expand(t, x0) * z1
    predictions = velocity(z, t, heads)
    torch.testing.assert_close(predictions, golden(f"{key}/pred"), rtol=0, atol=1e-12)
    with torch.no_grad():
        targets = cud.catch_up_targets(velocity, z, t, h, predictions[0], z1 - x0, heads)
    torch.testing.assert_close(targets, golden(f"{key}/target"), rtol=0, atol=2e-8)
    masked = (targets == z1 - x0).flatten(2).all(2)
    assert (masked == ~golden(f"{key}/mask")).all()

    loss = cud.catch_up_loss(velocity, x0, z1, t, h, heads)
    torch.testing.assert_close(loss, golden(f"{key}/loss"), rtol=0, atol=2e-8)
    loss.backward()
    torch.testing.assert_close(velocity.w.b2.grad, golden(f"{key}/grad_b2"), rtol=0, atol=2e-8)
    if heads == 1:
        quarter = cud.catch_up_loss(velocity, x0, z1, t, h, w=2 / 4)
        torch.testing.assert_close(
            quarter, golden(f"{key}/loss_adaptive_quarter"), rtol=0, atol=2e-8
        )


def test_the_goldens_have_masked_samples():
    masked = sum((~golden(f"{c['key']}/mask")).sum() for c in CONFIG["runs"])
    assert 0 < masked < 6 * len(CONFIG["runs"]) / 2


def test_kl_is_the_official_one():
    mu, logvar = golden("kl_mu"), golden("kl_logvar")
    _, kl = cud.encode(lambda x0, t, heads: (mu, logvar), mu, mu)
    torch.testing.assert_close(kl, golden("kl_value"), rtol=0, atol=1e-12)


def test_ema_is_the_official_one():
    """Late in a run; early it is the mean of what there is."""
    net = nn.ParameterDict({"p": golden("ema_init").clone()})
    ema = copy.deepcopy(net)
    for params in golden("ema_params"):
        with torch.no_grad():
            net["p"].copy_(params)
        cud.ema_update(ema, net, cud.ema_decay(10**6))
    torch.testing.assert_close(ema["p"].data, golden("ema_result"), rtol=0, atol=1e-14)
    cud.ema_update(ema, net, cud.ema_decay(0))
    expected = 0.1 * golden("ema_result") + 0.9 * golden("ema_params")[-1]
    torch.testing.assert_close(ema["p"].data, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shakedrop", [0, 1])
def test_shakedrop_and_further_heads_are_the_official_ones(shakedrop):
    other = ("in_channels", "out_channels", "phi", "decoder_type")
    options = {k: v for k, v in CONFIG["shakedrop_net"].items() if k not in other}
    raw = ddpmpp(img_channels=3, **options)
    phi = CONFIG["shakedrop_net"]["phi"] if shakedrop else None
    net = cud.Velocity(raw, heads=2, phi=phi).eval()

    def state(prefix):
        return {
            k.removeprefix(prefix): golden(k).float() for k in GOLDEN.files if k.startswith(prefix)
        }

    raw.load_state_dict(state("shake/sd/"))
    net.more[0].load_state_dict(
        {k.removeprefix("block."): v for k, v in state("shake/gen/").items()}
    )
    with torch.no_grad():
        out, head = net(golden("shake/x"), golden("shake/t"), 2)
    torch.testing.assert_close(out, golden(f"shake/out_{shakedrop}"), rtol=0, atol=1e-5)
    torch.testing.assert_close(head, golden(f"shake/head_{shakedrop}"), rtol=0, atol=1e-5)
    assert (golden("shake/out_1") - golden("shake/out_0")).abs().max() > 1e-2


@pytest.mark.parametrize("head", [1, 2])
def test_samplers_are_the_official_ones_but_for_their_faults(head):
    net, z = GoldenVelocity(), golden("z")

    def check(name, got):  # their times are float32
        expected = golden(f"sample/{name}_g{head}")
        torch.testing.assert_close(got.detach(), expected, rtol=0, atol=1e-7)

    for n in (1, 4):
        check(f"euler_{n}", cud.sample(net, z, nfe=n, head=head))
    check("dpm_solver_2_5", cud.sample(net, z, nfe=5, solver="ipndm", order=2, head=head))
    # Their Heun evaluates at the times of m = (n + 1) / 2 steps to 0, but moves by 1 / n.
    for n in (5, 7):
        m = (n + 1) // 2
        faulty = lambda z, t, head, m=m, n=n: net(z, t, head) * m / n
        check(f"heun_{n}", cud.sample(faulty, z, nfe=n, solver="heun", head=head))
        right = cud.sample(net, z, nfe=n, solver="heun", head=head)
        assert (right - golden(f"sample/heun_{n}_g{head}")).abs().max() > 0.01


# --------------------------------------------------------------------------- exactness


def one_point(point, heads=1):
    """The exact velocity if all data is `point`: z1 - point = (z - point) / t."""
    return lambda z, t, heads=heads: ((z - point) / expand(t, z))[None].expand(heads, *z.shape)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_for_data_at_one_point_both_terms_vanish_at_the_exact_velocity(heads):
    torch.manual_seed(0)
    point = torch.tensor([[[[0.4, -0.3]]]], dtype=torch.float64)
    z1 = torch.randn(64, 1, 1, 2, dtype=torch.float64)
    t = torch.rand(64, dtype=torch.float64) * 0.7 + 0.3
    arguments = (point.expand_as(z1), z1, t, torch.rand(64, dtype=torch.float64) / 16)
    for w in (2, 0):  # one term alone, then the other
        assert cud.catch_up_loss(one_point(point), *arguments, heads, w) < 1e-20
        assert cud.catch_up_loss(one_point(point + 0.1), *arguments, heads, 0) / 2 > 1e-3
    assert cud.flow_loss(one_point(point), *arguments[:3]) < 1e-20
    assert cud.flow_loss(one_point(point + 0.1), *arguments[:3]) > 1e-3

    def curved(z, t, heads=heads):
        return one_point(point)(z, t, heads) * (1 + 0.1 * expand(t, z))

    assert cud.catch_up_loss(curved, *arguments, heads, 2) / 2 > 1e-6
    straightness = from_notebook("straightness")
    straight, bent = (straightness(velocity, z1) for velocity in (one_point(point), curved))
    assert straight[0] < 1e-20 < 1e-4 < bent[0]
    assert straight[1].max() < 1e-10 < 1e-3 < bent[1].max()


@pytest.mark.parametrize("heads, expected", [(1, [1]), (2, [2, 1]), (3, [2, 1, 1])])
def test_the_official_weights_have_these_orders(heads, expected):
    """The error of v at the end of a target's step falls by 2^(order + 1) when h is halved."""

    def velocity(z, t, heads=1):
        return (torch.sin(2 * z) + expand(t, z) * z.cos() - 1.5)[None]

    def flow(z, t, to, n=400):
        z = z.clone()
        for i in range(n):
            a = t + (to - t) * i / n
            b, d = t + (to - t) * (i + 0.5) / n, expand((to - t) / n, z)
            k = [velocity(z, a)[0]]
            k.append(velocity(z + d / 2 * k[0], b)[0])
            k.append(velocity(z + d / 2 * k[1], b)[0])
            k.append(velocity(z + d * k[2], a + (to - t) / n)[0])
            z = z + d * (k[0] + 2 * k[1] + 2 * k[2] + k[3]) / 6
        return z

    z, errors = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None], []
    t = torch.full((7,), 0.9, dtype=torch.float64)
    for h in (0.04, 0.02):
        h = torch.full((7,), h, dtype=torch.float64)
        got = cud.catch_up_targets(velocity, z, t, h, velocity(z, t)[0], z * 0, heads)
        exact = [velocity(flow(z, t, t - i * h), t - i * h)[0] for i in range(1, heads + 1)]
        errors.append((got - torch.stack(exact)).abs().mean((1, 2)))
    orders = ((errors[0] / errors[1]).log2() - 1).tolist()
    assert orders == pytest.approx(expected, abs=0.25)


def test_targets_have_no_gradient_and_come_from_the_current_weights():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    z1 = torch.full((1, 1, 1, 1), 0.8, dtype=torch.float64)
    t, h = torch.tensor([0.5]).double(), torch.tensor([0.25]).double()

    # v = a z: the prediction is 0.4 a, the target a (0.4 - 0.25 * 0.4 a), that of the flow 0.8
    def velocity(z, t, heads=1):
        return (scale * z)[None]

    loss = cud.catch_up_loss(velocity, x0, z1, t, h)
    assert loss.item() == pytest.approx((0.4 - 0.3) ** 2 + (0.4 - 0.8) ** 2)
    loss.backward()
    assert scale.grad.item() == pytest.approx(2 * 0.4 * (0.4 - 0.3) + 2 * 0.4 * (0.4 - 0.8))


def test_the_encoder_gets_a_gradient_through_the_flow():
    torch.manual_seed(0)
    x0, noise, net = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), GoldenLike()
    z1, kl = cud.encode(net, x0, noise)
    torch.testing.assert_close(z1, net.a * x0 + noise * math.exp(net.b.item() / 2))
    expected = ((net.a * x0) ** 2 + net.b.exp() - 1 - net.b).mean() / 2
    torch.testing.assert_close(kl, expected)
    loss = cud.catch_up_loss(
        lambda z, t, heads=1: 0.3 * z[None], x0, z1, torch.full((3,), 0.5), torch.full((3,), 0.02)
    )
    grads = torch.autograd.grad(loss, (net.a, net.b))
    assert all(g.abs() > 1e-3 for g in grads)


class GoldenLike(nn.Module):
    """An encoder: mu = a x0, logvar = b; conditioned on t = 1."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.7))

    def forward(self, z, t, heads):
        assert t == 1 and heads == 2
        return self.a * z, self.b.expand_as(z)


def test_one_step_loss():
    z, x0 = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), -0.2)
    v, ema = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.4))

    def net(p):
        def velocity(z, t):
            assert t == 1
            return p * torch.ones_like(z)[None]

        return velocity

    loss = cud.one_step_loss(net(v), net(ema), z, x0)  # the EMA gets no gradient
    assert loss.item() == pytest.approx((0.5 - 0.9 + 0.2) ** 2 + 0.1 * 0.5**2)
    loss.backward()
    assert v.grad.item() == pytest.approx(-2 * (0.5 - 0.9 + 0.2) + 0.1 * 2 * 0.5)
    assert ema.grad is None


def gaussian():
    """One Gaussian as a velocity in t, and the exact solution of its ODE from t = 1.

    (z - (1 - t) m) / sqrt((1 - t)^2 s^2 + t^2) stays the same along it.
    """
    m, s = torch.tensor([[[0.3, -0.6]]], dtype=torch.float64), 0.5
    denoiser = GaussianMixture(m[None], torch.tensor([s]))

    def velocity(z, t, heads=1):
        t = torch.as_tensor(t, dtype=z.dtype).clamp(1e-9, 1 - 1e-9)
        x, sigma = edm_from_flow(z, t)
        return ((z - denoiser(x, sigma.flatten())) / expand(t, z))[None]

    return velocity, denoiser, lambda z: m + s * z


@pytest.mark.parametrize(
    "solver, order, expected",
    [("euler", None, 1), ("heun", None, 2), ("ipndm", 2, 2), ("ipndm", 3, 2.3)],
)
def test_samplers_in_t_converge(solver, order, expected):
    """The last begins with an Euler step."""
    velocity, _, exact = gaussian()
    z = noise_from_seeds(range(50), (1, 1, 2))
    options, errors = {"order": order} if order else {}, []
    for n in (33, 65):
        got = cud.sample(velocity, z, nfe=n, solver=solver, **options)
        errors.append((got - exact(z)).abs().max().item())
    ratio = errors[0] / errors[1]
    assert errors[0] < 0.1 and 2 ** (expected - 0.35) < ratio < 2 ** (expected + 0.9), errors


def test_in_sigma_it_is_the_same_ode():
    """What a velocity predicts of the data is a denoiser in the variables of common/."""
    velocity, denoiser, exact = gaussian()
    noise = noise_from_seeds(range(50), (1, 1, 2))
    for solver, steps in ("heun", 60), ("unipc", 60), ("euler", 60):
        got = cud.sample(velocity, noise, nfe=steps, solver=solver, grid="edm")
        sigmas = sigma_grid("edm", steps // 2 if solver == "heun" else steps)
        expected = SOLVERS[solver](denoiser, 80 * noise, sigmas)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
        if solver != "euler":  # sigma is at most 80, not infinity
            assert (got - exact(noise)).abs().max() < 0.03
            in_t = cud.sample(velocity, noise, nfe=61, solver="heun")
            assert (got - in_t).abs().max() < 0.03


def test_data_predicted_along_the_trajectory():
    """At the state z_i, x0 = z_i - t_i v; 16 steps of v = 2 t (z0 = z1 - sum) by hand."""
    z = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)

    def velocity(z, t, heads=1):
        return (z * 0 + 2 * expand(t, z))[None]

    states, velocities = from_notebook("along_euler")(velocity, z, 16)
    x0 = cud.one_step_targets(velocity, z)
    assert x0.shape == (3, 1, 1, 1, 1) and len(states) == 17 and len(velocities) == 16
    for i in range(17):
        t = 1 - i / 16
        state = 3 - sum(2 * (1 - k / 16) / 16 for k in range(i))
        assert states[i].item() == pytest.approx(state, abs=1e-12)
        if i < 16:
            assert velocities[i].item() == pytest.approx(2 * t)
        if i in (8, 11, 14):
            k = (8, 11, 14).index(i)
            assert x0[k].item() == pytest.approx(state - 2 * t * t, abs=1e-12)


def test_straightness_by_hand():
    """v = 2 t from z = 0: n Euler steps end in -(n + 1) / n.

    So the straightness is the mean of ((n + 1) / n - 2 (1 - i / n))^2.
    """
    n, z = 4, torch.zeros(2, 1, 1, 1)
    expected = sum(((n + 1) / n - 2 * (1 - i / n)) ** 2 for i in range(n)) / n
    straightness = from_notebook("straightness")
    mean, from_line = straightness(lambda z, t, heads: (z * 0 + 2 * expand(t, z))[None], z, n)
    assert mean == pytest.approx(expected, rel=1e-5)
    euler = [-sum(2 * (1 - k / n) / n for k in range(i)) for i in range(n + 1)]
    by_hand = [abs(e - i / n * euler[-1]) for i, e in enumerate(euler)]
    for distance in from_line.T.tolist():
        assert distance == pytest.approx(by_hand, abs=1e-6) and max(distance) > 0.2


# ---------------------------------------------------------------------------- training


def tiny(tmp_path, **options):
    return cud.Config(out=str(tmp_path), **{**TINY, "steps": 3, **options})


def test_training_is_what_a_plain_loop_does(tmp_path):
    """Three iterations of RK12, and the baseline, written out.

    Draws, rate, Adam, EMA, order of the data. An iteration of CUD costs 4 forward passes, one of
    the baseline 3.
    """
    config = tiny(tmp_path, baseline=True, adaptive_weight=True, seed=3)
    models = cud.train(config)
    torch.manual_seed(3)
    data = load_dataset("digits")
    first = cud.make_net(config, data)
    order = torch.from_numpy(np.random.default_rng((3, 0)).permutation(1500))
    for name, iterations in ("cud", 3), ("rectified-flow", 3), ("rectified-flow-equal-compute", 4):
        net = copy.deepcopy(first)
        ema = copy.deepcopy(first)
        optimizer = torch.optim.Adam(net.parameters())
        torch.manual_seed(4)
        for i in range(iterations):
            x0 = data.images[order[4 * i : 4 * i + 4]] / 127.5 - 1
            (t, u), z1 = torch.rand(2, 4), torch.randn(4, 1, 8, 8)
            t = 1e-5 + (1 - 1e-5) * t
            z, h = x0 + t[:, None, None, None] * (z1 - x0), u / 16
            v = net(z, t)[0]
            loss = (v - (z1 - x0)).square().mean()
            if name == "cud":
                with torch.no_grad():
                    later = net(z - h[:, None, None, None] * v, (t - h).clamp(min=1e-5))[0]
                late = (t >= 1e-5 + h)[:, None, None, None]
                catch_up = torch.where(late, v - later, v - (z1 - x0)).square().mean()
                loss = 2 * i / 3 * catch_up + 2 * (1 - i / 3) * loss
            optimizer.param_groups[0]["lr"] = config.lr * min(1, (i + 1) / 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for old, new in zip(ema.parameters(), net.parameters()):
                    old.lerp_(new, 1 - (1 + i) / (10 + i))
        for ours, expected in zip(models[name].parameters(), ema.parameters()):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


def test_both_flows_see_the_same(tmp_path, monkeypatch):
    ours, theirs = (watch(monkeypatch, cud, name) for name in ("catch_up_loss", "flow_loss"))
    cud.train(tiny(tmp_path, baseline=True))
    for a, b in zip(ours, theirs):
        for k in (1, 2, 3):  # x0, z1, t
            assert torch.equal(a[k], b[k])
        assert (a[4] > 0).all() and (a[4] < 1 / 16).all() and len(set(a[4].tolist())) == 4
    assert len(ours) == 3 and len(theirs) == 4 and not torch.equal(ours[0][2], ours[1][2])


@pytest.mark.parametrize("rk, evaluations", [("12", 2), ("23", 4), ("34", 6)])
def test_evaluations_are_counted_as_they_are_and_targets_have_no_gradient(
    tmp_path, monkeypatch, rk, evaluations
):
    """Dropout acts on the targets too, as in the official code."""
    modes, original = [], cud.Velocity.forward

    def watched(self, z, t, heads=1, labels=None):
        modes.append((self.training, torch.is_grad_enabled()))
        return original(self, z, t, heads)

    monkeypatch.setattr(cud.Velocity, "forward", watched)
    flow_iterations = watch(monkeypatch, cud, "flow_loss")
    cud.train(tiny(tmp_path, rk=rk, steps=3, baseline=True, dropout=0.2))
    step = [(True, True)] + [(True, False)] * (evaluations - 1)
    assert modes[: 2 * evaluations] == 2 * step
    # As many passes as 3 iterations of CUD, of 3 passes each; all but one of CUD's evaluations
    # are one pass, and the one with a gradient is 3.
    assert len(flow_iterations) == evaluations + 2
    assert len(modes) == 3 * evaluations + len(flow_iterations)


def test_coupling_and_kl_weight_reach_the_loss(tmp_path, monkeypatch):
    """One iteration from the same start with a KL term of 0.7 and weights 0 and 20.

    z1 is the encoder's, and the encoder is trained.
    """
    original, seen, losses = cud.encode, watch(monkeypatch, cud, "catch_up_loss"), []
    monkeypatch.setattr(cud, "encode", lambda *a: (original(*a)[0], torch.tensor(0.7)))
    encoded = watch(monkeypatch, cud, "encode")
    for weight in (0.0, 20.0):
        config = tiny(tmp_path, independent=False, steps=1, kl_weight=weight)
        run = Run("cud", config)
        with torch.no_grad():
            before = (
                cud.make_net(config, load_dataset("digits")),
                cud.make_net(config, load_dataset("digits"), encoder=True),
            )
        torch.manual_seed(0)
        cud.train(config, run)
        losses.append(run.loss.item())
    assert losses[1] - losses[0] == pytest.approx(20 * 0.7, rel=1e-5)
    (_, x0, noise), (after, _, again) = encoded
    assert torch.equal(noise, again) and torch.equal(seen[0][1], x0)
    expected = cud.encode(before[1], x0, noise)[0]
    torch.testing.assert_close(seen[0][2], expected, rtol=1e-5, atol=1e-5)
    moved = [not torch.equal(a, b) for a, b in zip(before[1].parameters(), after.parameters())]
    assert sum(moved) > len(moved) / 2


def test_the_student_starts_from_the_ema_and_takes_its_targets_one_after_another(
    tmp_path, monkeypatch
):
    losses = watch(monkeypatch, cud, "one_step_loss")
    starts, original = [], cud.same_start

    def watched(run, stream, optimizer, start, *nets):
        original(run, stream, optimizer, start, *nets)
        starts.append(copy.deepcopy(nets))

    monkeypatch.setattr(cud, "same_start", watched)
    models = cud.train(tiny(tmp_path, distill_steps=2, shakedrop=True))
    net = models["cud"]
    assert len(starts[1]) == 2  # the student and its EMA
    for start in starts[1]:
        assert all(torch.equal(a, b) for a, b in zip(start.parameters(), net.parameters()))
    assert net.phi == 0.75 == models["cud-1step"].phi and losses[0][0].func.phi == 0.75
    z = noise_from_seeds(torch.arange(6) + 10**9, (1, 8, 8)).float()
    targets = cud.one_step_targets(net, z).float()
    for i, (velocity, ema, batch, x0) in enumerate(losses):
        assert velocity.func is not ema.func and not ema.func.training
        rows = [int((z == row).flatten(1).all(1).nonzero()) for row in batch]
        torch.testing.assert_close(x0, targets[i // 2][rows], rtol=0, atol=1e-6)
    assert len(losses) == 6
    assert any(
        not torch.equal(a, b) for a, b in zip(models["cud-1step"].parameters(), net.parameters())
    )


def test_every_row_is_made_as_its_name_its_count_and_the_options_say(monkeypatch):
    """Evaluations, times, head, labels and the result, of networks that record and differ."""
    calls, labels = [], torch.tensor([3, 1, 4])

    class Recorder:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, z, t, heads=1, labels=None):
            calls.append((*set(torch.as_tensor(t).reshape(-1).tolist()), heads, labels))
            v = self.factor * (z + 0.3 * expand(t, z)).sin()
            return torch.stack([(1 + head) * v for head in range(heads)])

    class Teacher(Recorder):
        net = SimpleNamespace(label_dim=0)

        def __call__(self, x, sigma, labels=None):
            calls.append((float(sigma), 1, labels))
            return self.factor * x / (1 + sigma)

    names = ["cud", *cud.FLOWS, "cud-1step"]
    nets = {name: Recorder(1 + 0.1 * k) for k, name in enumerate(names)}
    texts = ("euler/even", "heun/even", "ipndm2/even", "unipc3/cosine", "dpmpp2/vp", "euler/edm")
    options = dict(rk="34", head=2, sampler=texts, nfe=(3, 5), baseline=True)
    config = cud.Config(dataset="mnist", **options)
    monkeypatch.setattr(baselines, "load_teacher", lambda *_: Teacher(0.7))
    found = cud.samplers(config, nets) | untrained_samplers("mnist", config.nfe, "cpu", 0)
    rows, noise = set(found), noise_from_seeds(range(3), (1, 4, 4))
    for (row, nfe), sampler in found.items():
        calls.clear()
        got = sampler(noise, labels)
        name, _, how = row.removesuffix(")").partition(" (")
        solver, grid = how.split(", ") if how else ("euler", "even")
        order = {} if solver in SOLVERS else {"order": int(solver[-1])}
        solver = SOLVERS[solver if solver in SOLVERS else solver[:-1]]
        head = 2 if name == "cud" else 1
        steps = (nfe + 1) // 2 if solver.__name__ == "heun" else nfe  # its last step is Euler's
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigmas = t if grid == "even" else sigma_grid(grid, steps)
        told = sigmas if grid == "even" or name == "untrained" else sigmas / (1 + sigmas)
        assert len(calls) == nfe and all(call[1] == head for call in calls)
        assert all(call[2] is labels for call in calls)
        assert {round(call[0], 9) for call in calls} == {round(s, 9) for s in told[:-1].tolist()}

        def denoiser(x, s, name=name, grid=grid, head=head):
            if name == "untrained":
                return 0.7 * x / (1 + s)
            z, t = (x, s) if grid == "even" else (x / (1 + s), s / (1 + s))
            return z - t * nets[name](z, t, head)[-1]

        expected = solver(denoiser, sigmas[0] * noise, sigmas, **order)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        if name == "untrained":
            best = best_untrained("mnist", nfe)
            assert how == f"{solver_name(*best[:2])}, {best[2]}"
    suffixes = ["", *(f" ({text.replace('/', ', ')})" for text in texts[1:])]
    assert {row for row in rows if row[0][:9] != "untrained"} == {
        (name + suffix, nfe) for name in names[:3] for suffix in suffixes for nfe in (3, 5)
    } | {("cud-1step", 1)}
    assert sum(row[0].startswith("untrained (") for row in rows) == 2


@pytest.mark.parametrize("rk", ["12", "23", "34"])
def test_the_head_that_is_sampled_is_the_official_one(rk):
    """README of the official code: --generator 2 for RK23, 3 for RK34, none for RK12."""
    assert cud.Config(rk=rk).head == int(rk[0])


def test_labels_need_classes(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    with pytest.raises(UsageError, match="--conditional True: folder has no classes here"):
        cud.train(
            tiny(tmp_path / "run", dataset="folder", data_dir=str(tmp_path), conditional=True)
        )


def test_labels_reach_the_net_in_training_and_sampling(tmp_path, monkeypatch):
    """Those of the images in training, those of the seeds in sampling.

    And the output depends on the class.
    """
    seen, original = [], cud.Velocity.forward
    monkeypatch.setattr(
        cud.Velocity,
        "forward",
        lambda self, z, t, heads=1, labels=None: (
            seen.append(labels if self.net.label_dim else "encoder")
            or original(self, z, t, heads, labels)
        ),
    )
    config = tiny(
        tmp_path, conditional=True, independent=False, distill_steps=1, baseline=True, eval_n=12,
        eval_batch=12, nfe=(1,),
    )  # fmt: skip
    models = cud.train(config)
    drawn = Stream(load_dataset("digits"), config.batch_size, config.seed).next()[1]
    first = [x for x in seen if not isinstance(x, str)]
    assert any(isinstance(x, str) for x in seen)
    assert torch.equal(first[0], drawn) and torch.equal(first[1], drawn)
    assert all(x is not None and x.ndim == 1 for x in first)
    seen.clear()
    run = Run("cud", config)
    evaluator = make_evaluator(config, run.device)
    measure(run, cud.samplers(config, models), models["cud"].net, evaluator)
    assert len(seen) == 4 and all(torch.equal(x, torch.arange(12) % 10) for x in seen)
    net = copy.deepcopy(models["cud"])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z = torch.randn(1, 1, 8, 8)
    assert not torch.allclose(*(net(z, 0.5, 1, torch.tensor([k])) for k in (0, 1)))


EVERYTHING = dict(  # 2, 6, 3 iterations
    rk="23", dropout=0.1, independent=False, shakedrop=True, baseline=True, distill_steps=1, steps=2
)


@pytest.mark.parametrize("calls", [1, 2, 4, 8, 9, 10])
def test_resume_is_bitwise(tmp_path, monkeypatch, calls, whole=[]):  # noqa: B006
    """Stopped in the middle or at the end of any of the three trainings, and continued.

    The checkpoint is the same to the last bit.
    """
    if not whole:
        cud.train(tiny(tmp_path / "whole", **EVERYTHING))
        whole.append(torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True))
    done = watch(monkeypatch, cud, "ema_update", fails_at=calls + 1)
    config = tiny(tmp_path / "cut", **EVERYTHING)
    with pytest.raises(ZeroDivisionError):
        cud.train(config, Run("cud", config, checkpoint_seconds=0))
    torch.manual_seed(12345)
    config.resume = True
    cud.train(config)
    cut = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert len(done) == 11 + 1
    for key in ("parts", "rng", "step"):
        assert not differences(cut[key], whole[0][key]), key
    assert set(cut["parts"]) == {"trained", "emas", "optimizer", "stream"}


# ----------------------------------------------------------------------- does it help?


def catch_up_gradient(teacher, tn):
    """Of the catch-up term, on the velocity of the shipped teacher, flat."""
    teacher.zero_grad()
    generator = torch.Generator().manual_seed(0)
    x0, _ = Stream(load_dataset("digits"), 32, 0).next()
    z1 = torch.randn(x0.shape, generator=generator)
    t, u = torch.rand(2, 32, generator=generator)

    def velocity(z, t, heads=1):
        x, sigma = edm_from_flow(z, t)
        return ((z - teacher(x, sigma.flatten())) / expand(t, z))[None]

    cud.catch_up_loss(velocity, x0, z1, 0.05 + 0.9 * t, u / tn, w=2).backward()
    return torch.cat([p.grad.flatten() for p in teacher.parameters() if p.grad is not None])


def test_bfloat16_keeps_the_gradient_at_the_paper_s_steps_but_not_at_far_smaller_ones():
    """Why CUD may train under autocast and PD not: its two times are up to 1 / TN apart."""
    teacher, cosines = load_teacher(None, "digits", torch.device("cpu")), []
    teacher.requires_grad_(True)
    for tn in (16, 1600):
        exact = catch_up_gradient(teacher, tn)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = catch_up_gradient(teacher, tn)
        cosines.append(torch.cosine_similarity(exact, rounded, dim=0).item())
    assert cosines[0] > 0.98 and cosines[1] < 0.6, cosines


class Small(nn.Module):
    """A velocity of 2-D points: three layers."""

    def __init__(self, heads=1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU())
        self.out = nn.ModuleList([nn.Linear(96, 2) for _ in range(heads)])

    def forward(self, z, t, heads=1):
        z, t = z.float(), torch.as_tensor(t).float().expand(len(z))[:, None]
        f = self.body(
            torch.cat([z, t, t**2, (3 * t).sin(), (3 * t).cos(), (6 * t).sin(), (6 * t).cos()], 1)
        )
        return torch.stack([out(f) for out in self.out[:heads]])


def sliced_wasserstein(a, b, directions=100):
    w = torch.randn(2, directions, generator=torch.Generator().manual_seed(0))
    w = (w / w.norm(dim=0)).to(a)
    return ((a @ w).sort(0).values - (b @ w).sort(0).values).abs().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("rk", [1, 2, 3])
def test_few_steps_on_a_mixture_are_better_than_rectified_flows(rk):
    """Eight Gaussians on a circle, equal iterations, same draws.

    Distance of 4-step samples to fresh data, mean of three seeds.
    """
    angle = torch.arange(8) * math.pi / 4
    mixture = GaussianMixture(
        1.5 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.1)
    )
    distances = {"cud": [], "flow": []}
    for seed in range(3):
        for name, found in distances.items():
            torch.manual_seed(seed)
            net = Small(rk)
            ema, optimizer = copy.deepcopy(net), torch.optim.Adam(net.parameters(), lr=2e-3)
            for i in range(1500):
                x0 = mixture.sample(256, torch.Generator().manual_seed(1000 * seed + i)).float()
                z1, t, u = torch.randn(256, 2), torch.rand(256), torch.rand(256)
                optimizer.zero_grad()
                if name == "cud":
                    loss = cud.catch_up_loss(net, x0, z1, t, u / 16, rk)
                else:
                    loss = cud.flow_loss(net, x0, z1, t)
                loss.backward()
                optimizer.step()
                cud.ema_update(ema, net, cud.ema_decay(i))
            noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(7))
            with torch.no_grad():
                x = cud.sample(ema, noise, nfe=4).float()
            fresh = mixture.sample(4000, torch.Generator().manual_seed(8)).float()
            found.append(sliced_wasserstein(x, fresh))
    assert sum(distances["cud"]) < 0.9 * sum(distances["flow"]), distances


# -------------------------------------------------------------------- the command line

run_main = partial(run_script, cud)


def test_smoke_run_leaves_everything(monkeypatch, tmp_path):
    common = ["--smoke", "--device", "cpu", "--nfe", 1, 2, "--model-channels", 8]
    run_main(monkeypatch, *common, "--baseline", "--out", tmp_path / "a")
    files = {"metrics.json", "samples.png", "fid.png", "log.jsonl", "checkpoint.pt"}
    assert {p.name for p in (tmp_path / "a").iterdir()} >= files
    rows = results(tmp_path / "a")
    names = ("cud", "rectified-flow", "rectified-flow-equal-compute")
    names = [name + how for name in names for how in ("", " (unipc3, even)")]
    expected = [(name, nfe) for name in names for nfe in (1, 2)] + [("cud-1step", 1)]
    expected += list(untrained_samplers("digits", (1, 2), "cpu", 0))
    assert [(row["name"], row["nfe"]) for row in rows] == expected
    for row in rows:
        assert row["fid_n"] == 32 and row["fid_features"] == "digits-classifier"
        assert row["fid_unseen"] > 0
    state = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 + 5 + 3  # 5: equal compute, 16 passes of 3 each

    # trained already: only measured again
    run_main(monkeypatch, *common, "--baseline", "--resume", "--out", tmp_path / "a")
    assert results(tmp_path / "a") == rows

    other = ["--rk", 23, "--sampler", "heun/even", "--nfe", 3, "--no-independent", "--shakedrop"]
    run_main(monkeypatch, *common, "--out", tmp_path / "b", "--distill-steps", 0, *other)
    row = results(tmp_path / "b")[0]
    assert (row["name"], row["nfe"]) == ("cud (heun, even)", 3)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--rk", "45"], ["--rk", "45", "12"]),
        (["--sampler", "rk4/even"], ["--sampler", "rk4", "euler"]),
        (["--sampler", "unipc4/even"], ["--sampler", "unipc4", "unipc3"]),
        (["--sampler", "euler"], ["--sampler euler", "even", "cosine"]),
        (["--head", "2"], ["--head 2", "RK12 has 1"]),
        (["--rk", "23", "--head", "0"], ["--head 0"]),
        (["--nfe", "0"], ["--nfe 0"]),
        (["--nfe", "4", "--sampler", "heun/even"], ["--nfe 4", "heun"]),
        (["--nfe", "3", "--sampler", "euler/even", "dpm2/edm"], ["--nfe 3", "dpm2"]),
        (["--tn", "0"], ["--tn 0"]),
        (["--tn", "2", "--rk", "34"], ["--tn 2", "3"]),
        (["--phi", "1.5"], ["--phi 1.5"]),
        (["--dropout", "2"], ["--dropout 2"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--lr", "0"], ["--lr 0"]),
        (["--distill-n", "0"], ["--distill-n 0"]),
        (["--eval-n", "0"], ["--eval-n 0"]),
        (["--model-channels", "7"], ["digits", "odd"]),
        (["--channel-mult", "1", "2", "2", "2", "2"], ["digits", "halved"]),
        *EVERYWHERE,
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    monkeypatch.setattr(cud, "make_evaluator", lambda *_, **__: None)
    assert_refused(cud, monkeypatch, tmp_path, arguments, names)


def test_networks_have_the_published_size():
    """2.16 M parameters for MNIST, 55.73 M for CIFAR-10 (README of the official code).

    The digits preset has the shipped teacher's; MNIST's is a smaller one, for a CPU.
    """
    official = dict(model_channels=32, channel_mult=(2, 2, 2), attn_resolutions=(16,))
    for dataset, changes, (resolution, channels), expected in [
        ("mnist", official, (28, 1), 2_155_201),
        ("cifar10", {}, (32, 3), 55_732_739),
        ("digits", {}, (8, 1), 748_737),
    ]:
        with torch.device("meta"):
            config = cud.Config(dataset=dataset, device="cuda", **changes)
            data = type("Data", (), {"resolution": resolution, "channels": channels})
            assert sum(p.numel() for p in cud.make_net(config, data).parameters()) == expected
