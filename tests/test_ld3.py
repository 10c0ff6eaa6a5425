"""ld3.py against numbers of the official code (golden/README.md, 3), itself, and end to end."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ld3
from common.diffusion import GRIDS, Denoiser, GaussianMixture, noise_from_seeds, sigma_grid
from common.machinery.run import Run
from common.machinery.schedule import save_schedule
from common.solvers import SOLVERS, dpmpp, ipndm, unipc
from common.unet import ddpmpp
from scripts import EVERYWHERE, assert_refused, calls_under_bfloat16, run_script
from toy import five_blobs

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
    small = dict(steps=100, train_n=20, valid_n=50, batch_size=5, nfe=4, distance="l2", lr2=0.1)
    return ld3.Config(device="cpu", out=str(tmp_path), **{**small, **options})


def learn(config, teacher, run=None):
    run = run or Run("ld3", config)
    return ld3.train(config, run, teacher, ld3.make_distance(config, run.device))


def rmse(config, denoiser, sigmas, sigmas_net, n=400):
    noise = noise_from_seeds(range(n), (1, 2, 2))
    solver = partial(SOLVERS[config.solver], order=config.order)
    x = solver(denoiser, 80 * noise, sigmas, sigmas_net=sigmas_net)
    return (x - ld3.teacher_samples(config, denoiser, noise)).square().mean().sqrt().item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "dpmpp", "mode": "time", "start": "edm"},
        {"solver": "euler", "times": "coupled"},
        {"objective": "hard", "solver": "ipndm"},
    ],
)
def test_learned_grid_beats_every_hand_made_one(toy, tmp_path, options):
    config = toy_config(tmp_path, **{k: v for k, v in options.items() if k != "start"})
    if "start" in options:
        config.start = (sigma_grid(options["start"], 4),) * 2
    sigmas, sigmas_net = learn(config, toy)
    hand_made = [rmse(config, toy, sigma_grid(kind, 4), None) for kind in GRIDS]
    assert rmse(config, toy, sigmas, sigmas_net) < 0.8 * min(hand_made)
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002)


def test_conditioning_noise_levels_help_on_their_own(toy, tmp_path):
    """theta1 stands still: theta2 alone must lower the validation loss.

    Not if times are coupled, and not before its phase begins.
    """
    cases = ({}, True), ({"times": "coupled"}, False), ({"theta1_steps": 30}, False)
    for options, moves in cases:
        config = toy_config(tmp_path, **{"steps": 30, "theta1_steps": 0, **options})
        config.lr1 = 0.0
        config.start = (sigma_grid("edm", 4),) * 2
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


def saved_latents(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["state"]
    return state["latents"], noise_from_seeds(range(10**6, 10**6 + 20), (1, 2, 2))


def test_soft_latents_stay_in_the_ball_and_hard_ones_do_not_move(toy, tmp_path):
    for objective in ("soft", "hard"):
        factor = 0.05 * 4**2 / 4  # a radius of 0.05 = factor * C H W / N^2
        learn(toy_config(tmp_path, steps=12, objective=objective, radius=factor), toy)
        latents, origin = saved_latents(tmp_path)
        offset = (latents - origin).flatten(1).norm(dim=1)
        assert offset.max() <= 0.05 + 1e-12 and (offset.max() > 0.01) == (objective == "soft")


def test_a_move_is_kept_only_if_the_loss_went_down(toy, tmp_path):
    """With a latent step of the wrong sign every move raises the loss: all must be refused."""
    for rate, kept in ((2.0, True), (-2.0, False)):
        config = toy_config(tmp_path, steps=8, radius=0.2)
        config.lr1, config.lr2, config.lr_latent = 0.0, 0.0, rate  # the grid stands still
        learn(config, toy)
        latents, origin = saved_latents(tmp_path)
        assert bool((latents != origin).any()) == kept


def test_every_round_visits_each_training_latent_once_in_a_new_order(toy, tmp_path, monkeypatch):
    """... and validation sees the other latents, always the same ones."""
    config = toy_config(tmp_path, steps=12, objective="hard", seed=3)
    origin = noise_from_seeds(torch.arange(70) + 4 * 10**6, (1, 2, 2))
    original, training, validation = ld3.distillation_loss, [], []

    def spy(solver, denoiser, x, *arguments):
        close = torch.cdist((x.detach() / 80).flatten(1), origin.flatten(1)) < 1e-9
        (training if torch.is_grad_enabled() else validation).append(close.nonzero()[:, 1])
        return original(solver, denoiser, x, *arguments)

    monkeypatch.setattr(ld3, "distillation_loss", spy)
    learn(config, toy)
    rounds = torch.cat(training).view(3, 20)  # 4 batches of 5 make a round
    for latents in rounds:
        assert sorted(latents.tolist()) == list(range(20))
    assert not torch.equal(rounds[0], rounds[1]) and not torch.equal(rounds[1], rounds[2])
    generators = [torch.Generator().manual_seed(3 * 10**6 + k) for k in range(3)]
    orders = torch.stack([torch.randperm(20, generator=generator) for generator in generators])
    assert torch.equal(rounds, orders)  # a resumed run finds the same order
    assert all(latents.tolist() == list(range(20, 70)) for latents in validation)


def test_a_plateau_is_five_validations_and_lowers_both_rates(toy, tmp_path, monkeypatch):
    """Validation losses by script: best at the 2nd, then none better; the grid goes back there."""
    config = toy_config(tmp_path, steps=40, theta1_steps=0, objective="hard")
    original, script, grids = ld3.distillation_loss, iter([9, 8, 7, *[8] * 20]), []
    first_grid_after = {}  # so many validations: that of the next update

    def scripted(solver, denoiser, x, target, sigmas, sigmas_net, distance):
        if torch.is_grad_enabled():
            first_grid_after.setdefault(len(grids), sigmas.detach())
            return original(solver, denoiser, x, target, sigmas, sigmas_net, distance)
        grids.append((sigmas, sigmas_net))
        return torch.full((len(x),), float(next(script)))

    monkeypatch.setattr(ld3, "distillation_loss", scripted)
    learned = learn(config, toy)
    parts = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]
    # 1 + 8 validations: the first, the two better ones, five without progress, one more
    rates = [parts[name]["param_groups"][0]["lr"] for name in ("optimizer1", "optimizer2")]
    assert rates == pytest.approx([0.8 * config.lr1, 0.8 * config.lr2 / 4])
    assert parts["state"]["bad"] == 1 and parts["state"]["loss"] == 7
    torch.testing.assert_close(learned, grids[2])
    assert not torch.equal(grids[7][0], grids[2][0])
    assert torch.equal(first_grid_after[7], grids[6][0])
    assert torch.equal(first_grid_after[8], grids[2][0])


def test_the_rate_of_the_latents_is_halved_after_a_round_without_a_move(toy, tmp_path):
    config = toy_config(tmp_path, steps=12)
    config.lr1, config.lr2, config.lr_latent = 0.0, 0.0, -2.0
    learn(config, toy)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["state"]
    assert state["lr_latent"] == -2.0 / 4 / 2**3


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


def test_the_two_gradients_are_clipped_apart(toy, tmp_path, monkeypatch):
    """theta2's gradient must not shorten theta1's step, least of all while theta2 is frozen."""
    clipped = []
    original = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        clipped.append(parameters)
        return original(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    learn(toy_config(tmp_path, steps=1), toy)
    assert [isinstance(p, torch.nn.Parameter) for p in clipped] == [True, True]


def test_resumed_training_equals_an_uninterrupted_one_bitwise(toy, tmp_path, monkeypatch):
    whole = learn(toy_config(tmp_path / "whole", steps=30, theta1_steps=10), toy)
    config = toy_config(tmp_path / "cut", steps=30, theta1_steps=10)
    original, calls = ld3.distillation_loss, []

    def crash(*arguments):  # at the 41st of some 70 losses: in mid-step, theta2 moves already
        calls.append(1)
        return original(*arguments) if len(calls) < 41 else 1 / 0

    monkeypatch.setattr(ld3, "distillation_loss", crash)
    with pytest.raises(ZeroDivisionError):
        learn(config, toy, Run("ld3", config, checkpoint_seconds=0))
    monkeypatch.setattr(ld3, "distillation_loss", original)
    config.resume = True
    run = Run("ld3", config)
    assert 10 < run.restored["step"] < 30
    resumed = learn(config, toy, run)
    assert torch.equal(whole[0], resumed[0]) and torch.equal(whole[1], resumed[1])


# ---- the command line

run_main = partial(run_script, ld3)


def test_smoke_run_leaves_everything_and_the_schedule_reads_back(monkeypatch, tmp_path, capsys):
    run_main(monkeypatch, "--smoke", "--out", tmp_path / "a", "--device", "cpu")
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
    again = ("--smoke", "--steps", 0, "--schedule", schedule, "--out", tmp_path / "b")
    monkeypatch.setattr(ld3, "make_distance", None)  # only training needs d, and its weights
    run_main(monkeypatch, *again)
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    measured = {row["name"]: row for row in metrics["results"]}
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
        (["--dataset", "cats"], ["--dataset", "cats", "digits"]),
        (["--solver", "rk45"], ["--solver", "rk45", "unipc"]),
        (["--solver", "dpmpp", "--order", "4"], ["--order 4", "1, 2, 3"]),
        (["--nfe", "0"], ["--nfe 0"]),
        (["--nfe", "-3"], ["--nfe -3"]),
        (["--nfe", "five"], ["--nfe", "five"]),
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
        (["--steps", "-1"], ["--steps -1"]),
        (["--reference", "nowhere.npz"], ["--reference nowhere.npz"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    rising, good = tmp_path / "rising.json", tmp_path / "good.json"
    sigmas = sigma_grid("edm", 4)
    for path, levels in ((rising, sigmas.flip(0)), (good, sigmas)):
        path.write_text(json.dumps({"sigmas": levels.tolist(), "sigmas_net": levels.tolist()}))
    assert_refused(ld3, monkeypatch, tmp_path, arguments, names, RISING=rising, GOOD=good)


def test_conditional_teacher_gets_uniform_classes(tmp_path, monkeypatch):
    """Label k % K for seed k, in training (seeds from 10^6 on) and in evaluation alike."""
    torch.manual_seed(0)
    small = dict(model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    teacher = Denoiser(ddpmpp(8, 1, label_dim=3, **small)).eval().requires_grad_(False)
    seen = []
    hook = teacher.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    config = ld3.Config(smoke=True, out=str(tmp_path), device="cpu", distance="l2", steps=2)
    learn(config, teacher)
    hook.remove()
    assert all(labels is not None for labels in seen)
    torch.testing.assert_close(seen[0], (torch.arange(6) + 10**6) % 3)


def test_solvers_named_in_the_paper_exist():
    named = {ld3.SOLVERS[name] for name in ("unipc", "dpmpp", "ipndm")}
    assert named == {unipc, dpmpp, ipndm}
