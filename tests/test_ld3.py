"""ld3.py against numbers of the official code (golden/README.md section 3), against itself, and end to end."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ld3
from common.diffusion import Denoiser, GaussianMixture, sigma_grid
from common.solvers import dpmpp, ipndm, unipc
from common.training import Run, noise_from_seeds
from common.unet import ddpmpp
from scripts import EVERYWHERE, assert_refused, run_script
from toy import five_blobs

GOLDEN = np.load(Path(__file__).parent / "golden" / "ld3_schedule.npz")
CONFIG = json.loads(str(GOLDEN["config"]))


def golden(name):
    return torch.as_tensor(GOLDEN[name], dtype=torch.float64)


class OfficialClamp(ld3.TimeGrid):
    """Lambda mode of the official code: the window is that of the raw logits (difference 1 in ld3.py's docstring)."""

    def window(self, levels):
        return super().window(self.theta1 if self.mode == "lambda" else levels)


def official_grid(case, params1, params2, cls=OfficialClamp):
    ends = np.exp([-CONFIG["lambda_max"], -CONFIG["lambda_min"]])
    if case["mode"] == "time":  # there the ends come from a float32 exp, and so does their difference
        low, high = (torch.tensor(-CONFIG[k], dtype=torch.float32).exp() for k in ("lambda_max", "lambda_min"))
        ends = [float(low), float(low) + float(high - low)]
    grid = cls(len(params1) - 1, ends[0], ends[1], case["mode"], case["window_rate"])
    with torch.no_grad():
        grid.theta1.copy_(params1)
        grid.theta2.copy_(params2)
    return grid


@pytest.mark.parametrize("i", range(12))
def test_grid_is_the_official_one(i):
    case, key = CONFIG["discretize"][i], f"m{i:02d}/"
    sigmas, told = official_grid(case, golden(key + "params1"), golden(key + "params2"))()
    torch.testing.assert_close(sigmas, golden(key + "t1_f64"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(told, golden(key + "t2_f64"), rtol=1e-12, atol=1e-12)
    # Ours: the same walk, but the network's levels stay within half the smallest gap of the grid.
    ours, told = official_grid(case, golden(key + "params1"), golden(key + "params2"), ld3.TimeGrid)()
    torch.testing.assert_close(ours, sigmas)
    levels, told = (ours, told) if case["mode"] == "time" else (-ours.log(), -told.log())
    gap = levels.diff().abs().min()
    expected = golden(key + "params2").clamp(-case["window_rate"] * gap, case["window_rate"] * gap)
    torch.testing.assert_close((told - levels)[1:-1], expected[1:-1])
    torch.testing.assert_close(told[[0, -1]], levels[[0, -1]])


@pytest.mark.parametrize("mode", ["time", "lambda"])
def test_official_lambda_mode_cannot_decouple_at_the_start(mode):
    case = {"mode": mode, "window_rate": 0.5}
    ones, shift = torch.ones(6, dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64)
    for cls in (OfficialClamp, ld3.TimeGrid):
        sigmas, told = official_grid(case, ones, shift, cls)()
        torch.testing.assert_close(sigmas, golden(f"init_ones_{mode}/t1"), rtol=1e-6, atol=1e-7)  # these two are float32 runs
        if cls is OfficialClamp or mode == "time":
            torch.testing.assert_close(told, golden(f"init_ones_{mode}/t2"), rtol=1e-6, atol=1e-7)
    if mode == "lambda":  # their t2 == t1 whatever theta2; ours moves the inner levels by theta2 (0.3 is below half the gap, 1.06)
        torch.testing.assert_close(golden("init_ones_lambda/t2"), golden("init_ones_lambda/t1"))
        torch.testing.assert_close((-told.log() + sigmas.log())[1:-1], shift[1:-1])


def mean_square(x, y):
    return (x - y).square().flatten(1).mean(1)


@pytest.mark.parametrize("i", range(5))
def test_losses_and_gradients_are_the_official_ones(i):
    case, key = CONFIG["gradient"][i], f"g{i}/"
    name, _, variant = case["solver"].partition("_")
    solver = ld3.make_solver(name, case["order"], variant)
    denoiser = GaussianMixture(golden("gmm_means").view(5, 3, 2, 2), golden("gmm_stds"))
    grid = official_grid(case, golden(key + "params1"), golden(key + "params2"))
    latent, target = golden(key + "latent").requires_grad_(), golden(key + "target")
    sigmas, told = grid()
    torch.testing.assert_close(sigmas.detach(), golden(key + "t1"), rtol=1e-9, atol=1e-12)
    loss = ld3.distillation_loss(solver, denoiser, 80 * latent, target, sigmas, told, mean_square)
    torch.testing.assert_close(loss.detach(), golden(key + "loss_vector_f64_fulldiff"), rtol=1e-8, atol=1e-12)
    absolute = ld3.distillation_loss(solver, denoiser, 80 * latent, target, sigmas, told, lambda x, y: (x - y).abs().flatten(1).mean(1))
    torch.testing.assert_close(absolute.mean().detach(), golden(key + "L1_loss_f64"), rtol=1e-8, atol=1e-12)
    loss.mean().backward()
    for gradient, what in ((grid.theta1.grad, "dparams1"), (grid.theta2.grad, "dparams2"), (latent.grad, "dlatent")):
        expected = golden(key + what + "_f64_fulldiff")
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8 * expected.abs().max().item())
        if name != "unipc" or what != "dparams1":  # theirs as shipped detaches UniPC's ratios: another gradient of theta1
            torch.testing.assert_close(golden(key + what + "_f64"), expected, rtol=1e-7, atol=1e-8 * expected.abs().max().item())
    torch.testing.assert_close(loss.detach().float(), golden(key + "loss_vector_official").float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["lambda", "time"])
@pytest.mark.parametrize("kind", ["uniform", "quadratic", "logsnr", "edm"])
def test_any_hand_made_grid_can_be_the_start(mode, kind):
    sigmas = sigma_grid(kind, 6)
    told = sigmas.clone()
    told[2] = (sigmas[2] * sigmas[3]) ** 0.5 if mode == "lambda" else told[2]
    told[3] *= 1 + 1e-5
    grid = ld3.TimeGrid(6, mode=mode)
    grid.set_to(sigmas, told)
    got, got_told = grid()
    torch.testing.assert_close(got, sigmas, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_told[3:], told[3:], rtol=1e-9, atol=1e-9)
    if mode == "lambda":  # the shift of half its own gap is cut to half the smallest one
        levels = -sigmas.log()
        shift = min(levels.diff().min() / 2, (levels[3] - levels[2]) / 2)
        torch.testing.assert_close(-got_told[2].log() - levels[2], shift)


def test_project_keeps_the_inside_and_brings_back_the_outside():
    origin = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    moved = torch.stack([torch.full((1, 2, 2), v, dtype=torch.float64) for v in (0.1, 2.0, 0.0)])  # norms 0.2, 4, 0
    got = ld3.project(moved + 5, origin + 5, 1.0) - 5
    torch.testing.assert_close(got, torch.stack([moved[0], moved[1] / 4, moved[2]]))


# ------------------------------------------------------------------------------------------------ training on an exact denoiser

@pytest.fixture(scope="module")
def toy():
    return five_blobs(0.5)


def toy_config(tmp_path, **options):
    options = {"steps": 100, "train_n": 20, "valid_n": 50, "batch_size": 5, "nfe": 4, "distance": "l2", "lr2": 0.1,
               "out": str(tmp_path), **options}
    return ld3.Config(device="cpu", **options)


def rmse(config, denoiser, sigmas, told, n=400):
    noise = noise_from_seeds(range(n), (1, 2, 2))
    x = ld3.make_solver(config.solver, config.order, config.variant)(denoiser, 80 * noise, sigmas, sigmas_net=told)
    return (x - ld3.teacher_samples(config, denoiser, noise)).square().mean().sqrt().item()


@pytest.mark.parametrize("options", [{}, {"solver": "dpmpp", "mode": "time", "init": "edm"}, {"solver": "euler", "times": "coupled"},
                                     {"objective": "hard", "solver": "ipndm"}])
def test_learned_grid_beats_every_hand_made_one(toy, tmp_path, options):
    config = toy_config(tmp_path, **options)
    sigmas, told = ld3.train(config, teacher=toy)
    hand_made = [rmse(config, toy, sigma_grid(kind, 4), None) for kind in ("uniform", "quadratic", "logsnr", "edm")]
    assert rmse(config, toy, sigmas, told) < 0.8 * min(hand_made)
    assert (sigmas.diff() < 0).all() and sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002)


def test_levels_told_to_the_network_help_on_their_own(toy, tmp_path):
    """theta1 stands still: theta2 alone must lower the validation loss, unless times are coupled, and not before its phase begins."""
    for options, moves in (({}, True), ({"times": "coupled"}, False), ({"theta1_steps": 30}, False)):
        config = toy_config(tmp_path, **{"lr1": 0.0, "steps": 30, "theta1_steps": 0, "init": "edm", **options})
        sigmas, told = ld3.train(config, teacher=toy)
        torch.testing.assert_close(sigmas, sigma_grid("edm", 4))
        assert bool((told != sigmas).any()) == moves
        losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines() if "validation" in line]
        assert (losses[-1] < losses[0]) == moves


def test_checkpointing_changes_memory_only(toy, tmp_path):
    one = ld3.train(toy_config(tmp_path, steps=6), teacher=toy)
    two = ld3.train(toy_config(tmp_path, steps=6, checkpoint=True), teacher=toy)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_soft_latents_stay_in_the_ball_and_hard_ones_do_not_move(toy, tmp_path):
    for objective in ("soft", "hard"):
        config = toy_config(tmp_path, steps=12, objective=objective, radius=0.05)
        ld3.train(config, teacher=toy)
        latents = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["progress"]["latents"]
        offset = (latents - noise_from_seeds(range(10**6, 10**6 + 20), (1, 2, 2))).flatten(1).norm(dim=1)
        assert offset.max() <= 0.05 + 1e-12 and (offset.max() > 0.01) == (objective == "soft")


def test_a_move_is_kept_only_if_the_loss_went_down(toy, tmp_path, monkeypatch):
    """With a latent step of the wrong sign every move raises the loss (the grid's rate is 0): all must be refused."""
    options = dict(steps=8, lr1=0.0, lr2=0.0, radius=0.05)
    for rate, kept in ((2.0, True), (-2.0, False)):
        ld3.train(toy_config(tmp_path, lr_latent=rate, **options), teacher=toy)
        latents = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["progress"]["latents"]
        assert bool((latents != noise_from_seeds(range(10**6, 10**6 + 20), (1, 2, 2))).any()) == kept


def test_resumed_training_equals_an_uninterrupted_one_bitwise(toy, tmp_path, monkeypatch):
    whole = ld3.train(toy_config(tmp_path / "whole", steps=30, theta1_steps=10), teacher=toy)
    config = toy_config(tmp_path / "cut", steps=30, theta1_steps=10)
    original, calls = ld3.distillation_loss, []

    def crash(*arguments):  # at the 41st of some 70 losses: in the middle of a step, after theta2 has begun to move
        calls.append(1)
        return original(*arguments) if len(calls) < 41 else 1 / 0

    monkeypatch.setattr(ld3, "distillation_loss", crash)
    with pytest.raises(ZeroDivisionError):
        ld3.train(config, Run("ld3", config, checkpoint_seconds=0), toy)
    monkeypatch.setattr(ld3, "distillation_loss", original)
    config.resume = True
    run = Run("ld3", config)
    assert 10 < run.restored["step"] < 30
    resumed = ld3.train(config, run, toy)
    assert torch.equal(whole[0], resumed[0]) and torch.equal(whole[1], resumed[1])


# -------------------------------------------------------------------------------------------------------------- the command line

run_main = partial(run_script, ld3)


def test_smoke_run_leaves_everything_and_the_schedule_reads_back(monkeypatch, tmp_path, capsys):
    run_main(monkeypatch, "--smoke", "--out", tmp_path / "a", "--device", "cpu")
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"metrics.json", "samples.png", "grids.png", "schedule.json", "log.jsonl",
                                                           "checkpoint.pt"}
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["results"]}
    assert list(rows) == ["uniform", "quadratic", "logsnr", "edm", "ld3", "teacher"]
    assert all(row["fid_n"] == 32 and row["fid_features"] == "digits-classifier" for row in rows.values())
    assert rows["ld3"]["nfe"] == 5 and rows["teacher"]["nfe"] == 20 and metrics["seconds"] > 0
    out = capsys.readouterr().out
    assert "digits-classifier, n=32" in out and "device cpu" in out

    run_main(monkeypatch, "--smoke", "--steps", 0, "--schedule", tmp_path / "a" / "schedule.json", "--out", tmp_path / "b")
    again = {row["name"]: row for row in json.loads((tmp_path / "b" / "metrics.json").read_text())["results"]}
    assert again["ld3"] == rows["ld3"] and not (tmp_path / "b" / "schedule.json").exists()

    run_main(monkeypatch, "--smoke", "--steps", 0, "--out", tmp_path / "c")
    assert "fid" not in json.loads((tmp_path / "c" / "metrics.json").read_text())["results"][4]
    assert "not run" in capsys.readouterr().out


def test_schedule_is_what_diffusers_takes(tmp_path):
    """README: EulerDiscreteScheduler.set_timesteps(sigmas=schedule["sigmas"]) walks our levels."""
    diffusers = pytest.importorskip("diffusers")
    config = toy_config(tmp_path, solver="euler", sigma_min=0.05, sigma_max=10.0)
    sigmas = sigma_grid("edm", 4, 0.05, 10.0)
    ld3.write_schedule(tmp_path / "schedule.json", config, sigmas, sigmas)
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(sigmas=json.loads((tmp_path / "schedule.json").read_text())["sigmas"])
    torch.testing.assert_close(scheduler.sigmas[:5].double(), sigmas, rtol=1e-6, atol=1e-7)
    assert len(scheduler.timesteps) == 4


@pytest.mark.parametrize("arguments, names", [
    (["--dataset", "cats"], ["--dataset", "cats", "digits"]),
    (["--solver", "rk45"], ["--solver", "rk45", "unipc"]),
    (["--solver", "dpmpp", "--order", "4"], ["--order 4", "1, 2, 3"]),
    (["--nfe", "0"], ["--nfe 0"]),
    (["--nfe", "-3"], ["--nfe -3"]),
    (["--nfe", "five"], ["--nfe", "five"]),
    (["--solver", "heun", "--nfe", "5"], ["--nfe 5", "4 or 6"]),
    (["--sigma-min", "90"], ["90", "decrease"]),
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
])
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    rising, good = tmp_path / "rising.json", tmp_path / "good.json"
    sigmas = sigma_grid("edm", 4)
    for path, levels in ((rising, sigmas.flip(0)), (good, sigmas)):
        path.write_text(json.dumps({"solver": "unipc", "order": 3, "nfe": 4, "sigmas": levels.tolist(), "sigmas_net": levels.tolist()}))
    assert_refused(ld3, monkeypatch, tmp_path, arguments, names, RISING=rising, GOOD=good)


def test_conditional_teacher_gets_uniform_classes(tmp_path, monkeypatch):
    """Label k % K for seed k, in training (where seeds start at a multiple of 10^6) and in evaluation alike."""
    torch.manual_seed(0)
    teacher = Denoiser(ddpmpp(8, 1, label_dim=3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])).eval()
    teacher.requires_grad_(False)
    seen = []
    hook = teacher.net.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    config = ld3.Config(smoke=True, out=str(tmp_path), device="cpu", distance="l2", steps=2)
    ld3.train(config, teacher=teacher)
    hook.remove()
    assert all(labels is not None for labels in seen)
    torch.testing.assert_close(seen[0], (torch.arange(6) + 10**6) % 3)


def test_solvers_named_in_the_paper_exist():
    assert {ld3.SOLVERS["unipc"], ld3.SOLVERS["dpmpp"], ld3.SOLVERS["ipndm"]} == {unipc, dpmpp, ipndm}
