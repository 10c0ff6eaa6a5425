"""ld3.py against numbers of the official code (golden/README.md, 3), itself, and end to end."""

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ld3
from common.classifier import load_classifier
from common.diffusion import GRIDS, GaussianMixture, noise_from_seeds, sigma_grid
from common.machinery.run import Run
from common.machinery.schedule import save_schedule
from common.solvers import ORDERS, SOLVERS, unipc
from scripts import (
    EVERYWHERE, assert_refused, calls_under_bfloat16, conditional_teacher, results, run_script,
    watch,
)
from toy import Recorder, Toy, five_blobs

GOLDEN = np.load(Path(__file__).parent / "golden" / "ld3_schedule.npz")
CONFIG = json.loads(str(GOLDEN["config"]))


def golden(name):
    return torch.as_tensor(GOLDEN[name], dtype=torch.float64)


class OfficialWindow(ld3.TimeGrid):
    """The official window: in lambda mode that of the raw logits (difference 1 in ld3.py)."""

    rate = 0.5

    def window(self, levels):
        levels = self.theta1 if self.mode == "lambda" else levels
        return self.rate * levels.detach().diff().abs().min()


class GridWindow(ld3.TimeGrid):
    """Ours, for other rates than 1/2."""

    rate = 0.5

    def window(self, levels):
        return 2 * self.rate * super().window(levels)


def official_grid(case, params1, params2, cls=OfficialWindow):
    ends = np.exp([-CONFIG["lambda_max"], -CONFIG["lambda_min"]])
    if (
        case["mode"] == "time"
    ):  # there the ends come from a float32 exp, and so does their difference
        low, high = (
            torch.tensor(-CONFIG[k], dtype=torch.float32).exp()
            for k in ("lambda_max", "lambda_min")
        )
        ends = [float(low), float(low) + float(high - low)]
    grid = cls(len(params1) - 1, ends[0], ends[1], case["mode"])
    grid.rate = case["window_rate"]
    with torch.no_grad():
        grid.theta1.copy_(params1)
        grid.theta2.copy_(params2)
    return grid


@pytest.mark.parametrize("i", range(12))
def test_grid_is_the_official_one(i):
    case, key = CONFIG["discretize"][i], f"m{i:02d}/"
    sigmas, sigmas_net = official_grid(case, golden(key + "params1"), golden(key + "params2"))()
    torch.testing.assert_close(sigmas, golden(key + "t1_f64"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sigmas_net, golden(key + "t2_f64"), rtol=1e-12, atol=1e-12)
    # Ours: the same grid, but sigmas_net stays within half its smallest gap.
    grid = official_grid(case, golden(key + "params1"), golden(key + "params2"), GridWindow)
    levels, levels_net = grid()
    torch.testing.assert_close(levels, sigmas)
    if case["mode"] == "lambda":
        levels, levels_net = -levels.log(), -levels_net.log()
    window = case["window_rate"] * levels.diff().abs().min()
    expected = golden(key + "params2").clamp(-window, window)
    torch.testing.assert_close((levels_net - levels)[1:-1], expected[1:-1])
    torch.testing.assert_close(levels_net[[0, -1]], levels[[0, -1]])


@pytest.mark.parametrize("mode", ["time", "lambda"])
def test_official_lambda_mode_cannot_decouple_at_the_start(mode):
    case = {"mode": mode, "window_rate": 0.5}
    ones, shift = torch.ones(6, dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64)
    for cls in (OfficialWindow, GridWindow):
        sigmas, sigmas_net = official_grid(case, ones, shift, cls)()
        close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)  # of float32 runs
        close(sigmas, golden(f"init_ones_{mode}/t1"))
        if cls is OfficialWindow or mode == "time":
            close(sigmas_net, golden(f"init_ones_{mode}/t2"))
    if mode == "lambda":  # their t2 == t1 whatever theta2 is; ours shifts the inner levels by it
        torch.testing.assert_close(golden("init_ones_lambda/t2"), golden("init_ones_lambda/t1"))
        shifts = -sigmas_net.log() + sigmas.log()  # 0.3 is below half the gap, 1.06
        torch.testing.assert_close(shifts[1:-1], shift[1:-1])


def mean_square(x, y):
    return (x - y).square().flatten(1).mean(1)


def mean_absolute(x, y):
    return (x - y).abs().flatten(1).mean(1)


def test_distances_of_features(toy):
    """By loops: at every position of a map the activations are scaled to norm 1."""
    classifier = load_classifier("digits", torch.device("cpu"))
    x, y = noise_from_seeds(range(6), (1, 8, 8)).split(3)
    expected = torch.zeros(3)
    for a, b in zip(classifier.feature_maps(x.float()), classifier.feature_maps(y.float())):
        for i in range(3):
            total = 0
            for h in range(a.shape[2]):
                for w in range(a.shape[3]):
                    p, q = a[i, :, h, w], b[i, :, h, w]
                    total += ((p / p.norm() - q / q.norm()) ** 2).sum()
            expected[i] += total / (a.shape[2] * a.shape[3])
    about = dict(dataset="digits", data_dir=None, classifier_steps=None)
    config = SimpleNamespace(distance="features", **about)
    distance = ld3.make_distance(config, torch.device("cpu"))
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-6)
    for name, value in (("l2", (x - y).square().mean((1, 2, 3))),
                        ("rms", (x - y).square().mean((1, 2, 3)).sqrt())):
        config.distance = name
        torch.testing.assert_close(ld3.make_distance(config, None)(x, y), value)


@pytest.mark.parametrize("i", range(5))
def test_losses_and_gradients_are_the_official_ones(i):
    case, key = CONFIG["gradient"][i], f"g{i}/"
    name, _, variant = case["solver"].partition("_")
    more = {"variant": variant} if name == "unipc" else {}
    solver = partial(SOLVERS[name], order=case["order"], **more)
    denoiser = GaussianMixture(golden("gmm_means").view(5, 3, 2, 2), golden("gmm_stds"))
    grid = official_grid(case, golden(key + "params1"), golden(key + "params2"))
    latent, target = golden(key + "latent").requires_grad_(), golden(key + "target")
    sigmas, sigmas_net = grid()
    torch.testing.assert_close(sigmas.detach(), golden(key + "t1"), rtol=1e-9, atol=1e-12)
    arguments = solver, denoiser, 80 * latent, target, sigmas, sigmas_net
    loss = ld3.distillation_loss(*arguments, mean_square)
    close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-12)
    close(loss.detach(), golden(key + "loss_vector_f64_fulldiff"))
    absolute = ld3.distillation_loss(*arguments, mean_absolute)
    close(absolute.mean().detach(), golden(key + "L1_loss_f64"))
    loss.mean().backward()
    gradients = {"dparams1": grid.theta1, "dparams2": grid.theta2, "dlatent": latent}
    for what, tensor in gradients.items():
        expected = golden(key + what + "_f64_fulldiff")
        atol = 1e-8 * expected.abs().max().item()
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-7, atol=atol)
        if name != "unipc" or what != "dparams1":  # theirs as shipped detaches UniPC's ratios
            shipped = golden(key + what + "_f64")
            torch.testing.assert_close(shipped, expected, rtol=1e-7, atol=atol)
    torch.testing.assert_close(
        loss.detach().float(), golden(key + "loss_vector_official").float(), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["lambda", "time"])
@pytest.mark.parametrize("kind", GRIDS)
def test_any_hand_made_grid_can_be_the_start(mode, kind):
    sigmas = sigma_grid(kind, 6)
    sigmas_net = sigmas.clone()
    sigmas_net[2] = (sigmas[2] * sigmas[3]) ** 0.5 if mode == "lambda" else sigmas_net[2]
    sigmas_net[3] *= 1 + 1e-5
    grid = ld3.TimeGrid(6, mode=mode)
    grid.set_to(sigmas, sigmas_net)
    got, got_net = grid()
    torch.testing.assert_close(got, sigmas, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_net[3:], sigmas_net[3:], rtol=1e-9, atol=1e-9)
    if mode == "lambda":  # the shift of half its own gap is cut to half the smallest one
        levels = -sigmas.log()
        shift = min(levels.diff().min() / 2, (levels[3] - levels[2]) / 2)
        torch.testing.assert_close(-got_net[2].log() - levels[2], shift)


def test_project_keeps_the_inside_and_brings_back_the_outside():
    origin = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    values = torch.tensor([0.1, 2.0, 0.0], dtype=torch.float64)  # norms 0.2, 4, 0
    moved = values.view(3, 1, 1, 1).expand(3, 1, 2, 2)
    got = ld3.project(moved + 5, origin + 5, 1.0) - 5
    torch.testing.assert_close(got, torch.stack([moved[0], moved[1] / 4, moved[2]]))


# ---- training on an exact denoiser


@pytest.fixture(scope="module")
def toy():
    return five_blobs(0.5)


def toy_config(tmp_path, **options):
    """The official recipe, with larger batches."""
    small = dict(
        start="logsnr", objective="soft", optimizer="rmsprop", steps=100, theta1_steps=50,
        train_n=20, valid_n=50, batch_size=5, valid_every=5, nfe=4, distance="l2", lr1=5e-3,
        lr2=0.1,
    )
    return ld3.Config(device="cpu", out=str(tmp_path), **{**small, **options})


def learn(config, teacher, run=None):
    run = run or Run("ld3", config)
    return ld3.train(config, run, teacher, ld3.make_distance(config, run.device))


def rmse(config, denoiser, sigmas, sigmas_net, n=400, seed=0):
    noise = noise_from_seeds(range(seed, seed + n), (1, 2, 2))
    solver = partial(SOLVERS[config.solver], order=config.order)
    x = solver(denoiser, 80 * noise, sigmas, sigmas_net=sigmas_net)
    return (x - ld3.teacher_samples(config, denoiser, noise)).square().mean().sqrt().item()


# ---- the training loop, against a plain one


class Labelled(Toy):
    """Another mixture for each of three classes: moved by the label."""

    class net:
        img_shape, label_dim = (1, 2, 2), 3

    def forward(self, x, sigma, labels=None):
        shift = 0.3 * labels.view(-1, 1, 1, 1)
        return super().forward(x - shift, sigma) + shift


def plain_grid(theta1, theta2, lowest, highest):
    gaps = theta1[1:].exp() / theta1[1:].exp().sum()
    lam = -math.log(highest) + math.log(highest / lowest) * torch.cat([gaps.new_zeros(1),
                                                                      gaps.cumsum(0)])
    window = lam.detach().diff().min() / 2
    shift = torch.cat([theta2[:1] * 0, theta2[1:-1].clamp(-window, window), theta2[-1:] * 0])
    return (-lam).exp(), (-lam - shift).exp()


def plain_training(c, teacher, distance):
    """LD3 without torch.optim, Run and TimeGrid. -> grid, validation losses, what happened."""
    ids = torch.arange(c.train_n + c.valid_n)
    seeds = 10**6 * (c.seed + 1) + ids
    z = torch.stack([torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(int(s)))
                     for s in seeds]).double()
    solver = partial(SOLVERS[c.solver], order=c.order)
    denoisers = lambda i: lambda x, sigma: teacher(x, sigma, seeds[i] % 3)
    edm = sigma_grid("edm", c.teacher_nfe, c.sigma_min, c.sigma_max)
    target = unipc(denoisers(ids), c.sigma_max * z, edm, order=3)

    def losses_of(latents, i, grid):
        samples = solver(denoisers(i), c.sigma_max * latents, grid[0], sigmas_net=grid[1])
        return distance(samples, target[i])

    def validation(grid):
        return losses_of(z[c.train_n :], ids[c.train_n :], grid).mean().item()

    happened, latents = Counter(), z[: c.train_n].clone()
    kinds = GRIDS if c.start == "auto" else [c.start]
    hand_made = {kind: sigma_grid(kind, c.n, c.sigma_min, c.sigma_max) for kind in kinds}
    first = min(kinds, key=lambda kind: validation((hand_made[kind],) * 2))
    logits = hand_made[first].log().diff().abs().log()
    theta = [torch.cat([torch.ones(1), logits - logits.mean() + 1]), torch.zeros(c.n + 1)]
    theta = [t.double().requires_grad_() for t in theta]
    lr, lr_latent = [c.lr1, c.lr2], c.lr_latent / c.nfe
    if c.optimizer == "rmsprop":
        lr[1] /= c.nfe
    m, v = ([torch.zeros(c.n + 1).double() for _ in theta] for _ in range(2))
    best, bad, moved = validation((hand_made[first],) * 2), 0, 0
    best_theta, validations = [t.detach().clone() for t in theta], []
    a_round = c.train_n // c.batch_size
    for step in range(c.steps):
        rng = torch.Generator().manual_seed(c.seed * 10**6 + step // a_round)
        order = torch.randperm(c.train_n, generator=rng)
        i = order[step % a_round * c.batch_size :][: c.batch_size]
        x = latents[i].clone().requires_grad_()
        old = losses_of(x, i, plain_grid(*theta, c.sigma_min, c.sigma_max))
        *gradients, of_x = torch.autograd.grad(old.mean(), [*theta, x])
        with torch.no_grad():
            for k, (t, g) in enumerate(zip(theta, gradients)):
                happened[f"clipped theta{k + 1}"] += int(g.norm() > 1)
                g = g / max(1, g.norm() + 1e-6)
                if c.optimizer == "adam":
                    m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
                    rate = lr[k] * (1 + math.cos(math.pi * step / c.steps)) / 2
                    age = step + 1 if k == 0 else step + 1 - c.theta1_steps
                    change = m[k] / (1 - 0.9**age) / ((v[k] / (1 - 0.999**age)).sqrt() + 1e-8)
                elif k == 0:
                    v[k] = 0.99 * v[k] + 0.01 * g**2
                    m[k] = 0.9 * m[k] + g / (v[k].sqrt() + 1e-8)
                    rate, change = lr[k], m[k]
                else:
                    rate, change = lr[k], g
                if k == 0 or (step >= c.theta1_steps and c.times == "decoupled"):
                    t -= rate * change
                elif c.optimizer == "adam":
                    m[k], v[k] = torch.zeros_like(t), torch.zeros_like(t)
            if c.objective == "soft":
                new = x - lr_latent * of_x - z[i]
                radius = c.radius * 4 / c.nfe**2
                for row in new:
                    happened["outside the ball"] += int(row.norm() > radius)
                    row *= min(1, radius / row.norm())
                new += z[i]
                grid = plain_grid(*theta, c.sigma_min, c.sigma_max)
                for j, k in enumerate(i.tolist()):
                    if losses_of(new, i, grid)[j] < old[j]:
                        latents[k], moved = new[j], moved + 1
                        happened["moved"] += 1
                    else:
                        happened["refused"] += 1
                if (step + 1) % a_round == 0:
                    lr_latent, moved = lr_latent / (1 if moved else 2), 0
            if (step + 1) % c.valid_every == 0 or step + 1 == c.steps:
                loss = validation(plain_grid(*theta, c.sigma_min, c.sigma_max))
                validations.append(loss)
                bad += 1
                if loss < best:
                    best, bad, best_theta = loss, 0, [t.clone() for t in theta]
                if bad == 5 and c.optimizer == "rmsprop":
                    happened["plateau"] += 1
                    bad = 0
                    for t, b in zip(theta, best_theta):
                        t.copy_(b)
                    lr = [0.8 * rate for rate in lr]
    return plain_grid(*best_theta, c.sigma_min, c.sigma_max), validations, latents, happened


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {},
            ["clipped theta1", "clipped theta2", "moved", "refused", "outside the ball", "plateau"],
        ),
        (
            {"optimizer": "adam", "objective": "hard", "start": "auto", "lr2": 0.05},
            ["clipped theta1"],
        ),
        ({"solver": "heun", "nfe": 6, "start": "edm"}, ["moved", "refused"]),
        ({"solver": "dpmpp", "times": "coupled", "start": "vp"}, ["moved", "plateau"]),
    ],
)
def test_training_is_that_of_a_plain_loop(tmp_path, options, expected):
    """With labels, clipped gradients, a seed, a range and learning rates of no preset."""
    teacher = five_blobs(0.5)
    teacher = Labelled(teacher.means, teacher.stds)
    given = dict(
        seed=3, steps=42, theta1_steps=8, train_n=13, valid_n=9, batch_size=4, valid_every=1,
        sigma_min=0.01, sigma_max=40.0, teacher_nfe=12, lr1=0.03, lr2=0.4, lr_latent=7.0,
        radius=0.4,
    )
    config = toy_config(tmp_path, **{**given, **options})
    distance = lambda x, y: 30 * (x - y).square().flatten(1).mean(1)
    run = Run("ld3", config)
    learned = ld3.train(config, run, teacher, distance)
    grid, validations, latents, happened = plain_training(config, teacher, distance)
    assert all(happened[what] for what in expected), happened
    close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-9)
    close(learned, tuple(t.detach() for t in grid))
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    close(torch.tensor([line["validation"] for line in lines if "validation" in line]).double(),
          torch.tensor(validations).double())
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["state"]
    close(state["latents"], latents)


# ---- what training brings


def test_a_start_is_never_left_for_something_worse(toy, tmp_path, capsys):
    """Updates far too large: the start comes back as it was, and is not called learned."""
    far = dict(steps=6, optimizer="adam", lr1=2.0, times="coupled")
    config = toy_config(tmp_path, start="auto", **far)
    sigmas, sigmas_net = learn(config, toy)
    losses = {
        kind: rmse(config, toy, sigmas, None, 50, 10**6 + 20)
        for kind, (sigmas, _) in config.starts.items()
    }
    best = min(losses, key=losses.get)
    assert torch.equal(sigmas, sigma_grid(best, 4)) and torch.equal(sigmas_net, sigmas)
    assert f"the row ld3 is the {best} grid" in capsys.readouterr().out


def test_a_coupled_run_takes_the_grid_alone_of_a_decoupled_schedule(toy, tmp_path):
    sigmas = sigma_grid("edm", 4)
    sigmas_net = sigmas.clone()
    sigmas_net[1:-1] *= 0.9
    save_schedule(tmp_path / "schedule.json", sigmas, sigmas_net)
    given = dict(schedule=str(tmp_path / "schedule.json"), steps=1)
    for times, start_net in (("coupled", sigmas), ("decoupled", sigmas_net)):
        config = toy_config(tmp_path, times=times, **given)
        (start, net), = config.starts.values()
        assert torch.equal(start, sigmas) and torch.equal(net, start_net)
        config.lr1 = config.lr2 = 0.0
        torch.testing.assert_close(learn(config, toy), (sigmas, start_net))


@pytest.mark.parametrize(
    "options, factor",
    [
        ({}, 0.8),
        ({"solver": "dpmpp", "mode": "time", "start": "edm"}, 0.8),
        ({"solver": "euler", "times": "coupled", "start": "auto"}, 1),  # vp is next to the best
        ({"objective": "hard", "solver": "ipndm", "start": "auto", "optimizer": "adam"}, 0.8),
    ],
)
def test_learned_grid_beats_every_hand_made_one(toy, tmp_path, options, factor):
    config = toy_config(tmp_path, **options)
    sigmas, sigmas_net = learn(config, toy)
    hand_made = [rmse(config, toy, sigma_grid(kind, 4), None) for kind in GRIDS]
    assert rmse(config, toy, sigmas, sigmas_net) < factor * min(hand_made)
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002)


def test_conditioning_noise_levels_help_on_their_own(toy, tmp_path):
    """theta1 stands still: theta2 alone must lower the validation loss.

    Not if times are coupled, and not before its phase begins.
    """
    cases = ({}, True), ({"times": "coupled"}, False), ({"theta1_steps": 30}, False)
    for options, moves in cases:
        given = {"steps": 30, "theta1_steps": 0, "start": "edm", **options}
        config = toy_config(tmp_path, **given)
        config.lr1 = 0.0
        sigmas, sigmas_net = learn(config, toy)
        torch.testing.assert_close(sigmas, sigma_grid("edm", 4))
        assert bool((sigmas_net != sigmas).any()) == moves
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        losses = [json.loads(line)["validation"] for line in lines if "validation" in line]
        assert (losses[-1] < losses[0]) == moves


def test_checkpointing_changes_memory_only(toy, tmp_path):
    one = learn(toy_config(tmp_path, steps=6), toy)
    two = learn(toy_config(tmp_path, steps=6, checkpoint=True), toy)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_the_fit_is_float32_where_others_use_bfloat16(toy, tmp_path, monkeypatch):
    """Measured in bfloat16 on digits, 4 to 10 evaluations: theta's gradient has cosine .999 to
    float32's, the latents' .998, and the loss is up to 4 % too large."""
    seen = calls_under_bfloat16(monkeypatch, toy, "forward")
    learn(toy_config(tmp_path, steps=2), toy)
    assert set(seen) == {False}


def saved_state(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["state"]
    return state, noise_from_seeds(range(10**6, 10**6 + 20), (1, 2, 2))


def test_soft_latents_stay_in_the_ball_and_hard_ones_do_not_move(toy, tmp_path):
    for objective in ("soft", "hard"):
        factor = 0.05 * 4**2 / 4  # a radius of 0.05 = factor * C H W / N^2
        learn(toy_config(tmp_path, steps=12, objective=objective, radius=factor), toy)
        state, origin = saved_state(tmp_path)
        offset = (state["latents"] - origin).flatten(1).norm(dim=1)
        assert offset.max() <= 0.05 + 1e-12 and (offset.max() > 0.01) == (objective == "soft")


def test_a_move_is_kept_only_if_the_loss_went_down(toy, tmp_path):
    """With a latent step of the wrong sign every move raises the loss: all must be refused."""
    for rate, kept in ((2.0, True), (-2.0, False)):
        config = toy_config(tmp_path, steps=8, radius=0.2)
        config.lr1, config.lr2, config.lr_latent = 0.0, 0.0, rate  # the grid stands still
        learn(config, toy)
        state, origin = saved_state(tmp_path)
        assert bool((state["latents"] != origin).any()) == kept
        halved = 0 if kept else 2  # after each of the two rounds without a move
        assert state["lr_latent"] == rate / 4 / 2**halved


def test_the_rate_of_latents_is_halved_again_once_they_have_stopped(toy, tmp_path, monkeypatch):
    """They move in the first of three rounds of four batches, and stand still in the others."""
    original, calls = ld3.project, []

    def spy(moved, origin, radius):
        calls.append(1)
        return original(moved, origin, radius) if len(calls) <= 4 else origin

    monkeypatch.setattr(ld3, "project", spy)
    config = toy_config(tmp_path, steps=12, radius=0.2)
    config.lr1, config.lr2, config.lr_latent = 0.0, 0.0, 2.0  # the grid stands still
    learn(config, toy)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["state"]
    assert state["lr_latent"] == 2.0 / 4 / 2**2


def test_resumed_training_equals_an_uninterrupted_one_bitwise(toy, tmp_path, monkeypatch):
    whole = learn(toy_config(tmp_path / "whole", steps=30, theta1_steps=10), toy)
    config = toy_config(tmp_path / "cut", steps=30, theta1_steps=10)
    # The 41st of some 70 losses: in mid-step, theta2 moves already.
    watch(monkeypatch, ld3, "distillation_loss", fails_at=41)
    with pytest.raises(ZeroDivisionError):
        learn(config, toy, Run("ld3", config, checkpoint_seconds=0))
    config.resume = True
    run = Run("ld3", config)
    assert 10 < run.restored["step"] < 30
    resumed = learn(config, toy, run)
    assert torch.equal(whole[0], resumed[0]) and torch.equal(whole[1], resumed[1])


# ---- the command line

run_main = partial(run_script, ld3)


@pytest.mark.parametrize(
    "solver, nfe, n, options",
    [
        ("unipc", 5, 5, {}),
        ("unipc", 4, 4, {"order": 2, "variant": "bh2"}),
        ("heun", 6, 3, {}),
        ("dpmpp", 4, 4, {"order": 2, "sigma_max": 40, "teacher_nfe": 7}),
    ],
)
def test_every_row_is_sampled_as_its_name_says(
    toy, tmp_path, monkeypatch, solver, nfe, n, options
):
    """A recording denoiser: how often it is evaluated, at which levels, and the result."""
    highest = options.pop("sigma_max", 80)
    sigmas = sigma_grid("edm", n, 0.002, highest)
    sigmas_net = sigmas.clone()
    sigmas_net[1:-1] *= 0.9
    save_schedule(tmp_path / "schedule.json", sigmas, sigmas_net)
    samplers, rows, teacher = {}, [{"name": "ld3", "nfe": nfe}], Recorder(toy.means, toy.stds)
    monkeypatch.setattr(ld3, "load_teacher", lambda *arguments: teacher)
    monkeypatch.setattr(ld3, "measure", lambda run, s, *a, **k: samplers.update(s) or (rows, {}))
    monkeypatch.setattr(ld3, "save_rows", lambda *arguments: None)
    given = {"solver": solver, "nfe": nfe, "sigma_max": highest, "out": tmp_path / "run", **options}
    flags = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", v)]
    schedule = ("--schedule", tmp_path / "schedule.json")
    run_main(monkeypatch, "--smoke", "--steps", 0, "--device", "cpu", *schedule, *flags)
    teacher_nfe = options.pop("teacher_nfe", 20)
    assert set(samplers) == {(k, nfe) for k in (*GRIDS, "ld3")} | {("teacher", teacher_nfe)}
    noise = noise_from_seeds(range(3), (1, 2, 2))
    options = {"order": min(3, ORDERS[solver][-1]), **options}
    for (name, count), sampler in samplers.items():
        teacher.levels.clear()
        result = sampler(noise, None)
        assert len(teacher.levels) == count
        if name == "teacher":
            grid = sigma_grid("edm", teacher_nfe, 0.002, highest)
            expected = unipc(toy, highest * noise, grid, order=3)
        else:
            grid = sigmas if name == "ld3" else sigma_grid(name, n, 0.002, highest)
            net = sigmas_net if name == "ld3" else grid
            assert set(teacher.levels) <= set(net.tolist())
            solve = partial(SOLVERS[solver], sigmas_net=net, **options)
            expected = solve(toy, highest * noise, grid)
        torch.testing.assert_close(result, expected)


def test_smoke_run_leaves_all_and_its_schedule_reads_back(tmp_path, tiny, monkeypatch, capsys):
    command = ("--smoke", "--teacher", tiny, "--device", "cpu", "--out")
    run_main(monkeypatch, *command, tmp_path / "a")
    names = "metrics.json samples.png samples.npz grids.png schedule.json checkpoint.pt".split()
    assert {p.name for p in (tmp_path / "a").iterdir()} >= set(names)
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["results"]}
    assert list(rows) == [*GRIDS, "ld3", "teacher"]
    for row in rows.values():
        assert row["fid_n"] == 32 and row["fid_features"] == "digits-classifier"
    assert rows["ld3"]["nfe"] == 5 and rows["teacher"]["nfe"] == 20 and metrics["seconds"] > 0
    out = capsys.readouterr().out
    assert "digits-classifier, n=32" in out and "device cpu" in out

    schedule = tmp_path / "a" / "schedule.json"
    monkeypatch.setattr(ld3, "make_distance", None)  # only training needs d, and its weights
    run_main(monkeypatch, *command, tmp_path / "b", "--steps", 0, "--schedule", schedule)
    measured = {row["name"]: row for row in results(tmp_path / "b")}
    assert measured["ld3"] == rows["ld3"]
    assert not (tmp_path / "b" / "schedule.json").exists()


def test_schedule_is_what_diffusers_takes(tmp_path):
    """README: EulerDiscreteScheduler.set_timesteps(sigmas=schedule["sigmas"]) takes our grid."""
    diffusers = pytest.importorskip("diffusers")
    sigmas = sigma_grid("edm", 4, 0.05, 10.0)
    save_schedule(tmp_path / "schedule.json", sigmas, sigmas)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    scheduler.set_timesteps(sigmas=json.loads((tmp_path / "schedule.json").read_text())["sigmas"])
    torch.testing.assert_close(scheduler.sigmas[:5].double(), sigmas, rtol=1e-6, atol=1e-7)
    assert len(scheduler.timesteps) == 4


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--solver", "rk45"], ["--solver", "rk45", "unipc"]),
        (["--solver", "dpmpp", "--order", "4"], ["--order 4", "1, 2, 3"]),
        (["--nfe", "0"], ["--nfe 0"]),
        (["--solver", "heun", "--nfe", "5"], ["--nfe 5", "4 or 6"]),
        (["--sigma-min", "90"], ["--sigma-min 90", "below --sigma-max 80"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--teacher", "nowhere.pt"], ["nowhere.pt"]),
        (["--teacher", "FOREIGN"], ["foreign.pt"]),
        (["--schedule", "nowhere.json"], ["--schedule nowhere.json"]),
        (["--schedule", "FOREIGN"], ["--schedule", "foreign.pt"]),
        (["--schedule", "RISING"], ["--schedule", "rising.json", "decreasing"]),
        (["--schedule", "GOOD", "--nfe", "7"], ["--schedule", "good.json", "5 levels", "8"]),
        (["--schedule", "GOOD", "--nfe", "4", "--sigma-max", "70"], ["--schedule", "80", "70"]),
        *EVERYWHERE,
        (["--reference", "nowhere.npz"], ["--reference nowhere.npz"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    rising, good = tmp_path / "rising.json", tmp_path / "good.json"
    sigmas = sigma_grid("edm", 4)
    for path, levels in ((rising, sigmas.flip(0)), (good, sigmas)):
        path.write_text(json.dumps({"sigmas": levels.tolist(), "sigmas_net": levels.tolist()}))
    assert_refused(ld3, monkeypatch, tmp_path, arguments, names, RISING=rising, GOOD=good)


def test_conditional_teacher_gets_uniform_classes(tmp_path):
    """Label k % K for seed k, in training (seeds from 10^6 on) and in evaluation alike."""
    teacher, seen = conditional_teacher()
    learn(ld3.Config(smoke=True, out=str(tmp_path), device="cpu", distance="l2", steps=2), teacher)
    assert all(labels is not None for labels in seen)
    torch.testing.assert_close(seen[0], (torch.arange(6) + 10**6) % 3)
