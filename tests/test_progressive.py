"""progressive.py against the official code (golden/README.md, 5), closed forms, end to end."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import progressive
from common import UsageError
from common.baselines import halving_stages
from common.datasets import Stream, load_dataset
from common.diffusion import (
    Denoiser, GaussianMixture, ddim_levels, expand, sigma_grid, stage_levels, v_from_x0,
)
from common.machinery.run import Run
from common.solvers import euler
from common.teacher import load_teacher
from notebooks import losses
from scripts import assert_refused, calls_under_bfloat16, results, run_script, tiny_teacher, watch

FILE = np.load(Path(__file__).parent / "golden" / "pd_cfd.npz")
KEYS = [run["key"] for run in json.loads(str(FILE["config"]))["runs"]]


def golden(name):
    return torch.as_tensor(FILE[name], dtype=torch.float64)


class Case:
    """One golden run in our variables: with VP's a and s at index t, sigma = s / a, x = z / a."""

    def __init__(self, key):
        self.teacher = GaussianMixture(golden("gmm_means").view(5, 3, 2, 2), golden("gmm_stds"))
        self.a, self.s = (
            golden(f"{key}/sqrt_alphas_bar"), golden(f"{key}/sqrt_one_minus_alphas_bar"),
        )
        self.t = torch.as_tensor(FILE[f"{key}/t"])
        self.sigma, self.sigma_mid, self.sigma_end = (
            (self.s / self.a)[self.t - k] for k in (0, 1, 2)
        )
        self.z = golden(f"{key}/z_t")
        self.x = self.z / expand(self.a[self.t], self.z)
        self.target = golden(f"{key}/x_target")
        self.epsilon = key.endswith("epsilon")

    def student(self, a, b, c):
        """The golden student's x0: its output, a * teacher's + b z + c, is an x or an eps."""
        alpha, s = expand(self.a[self.t], self.z), expand(self.s[self.t], self.z)
        x0 = self.teacher(self.x, self.sigma)
        if not self.epsilon:
            return a * x0 + b * self.z + c
        return (self.z - s * (a * (self.z - alpha * x0) / s + b * self.z + c)) / alpha


def student_parameters():
    return [golden(f"student_{k}").clone().requires_grad_(True) for k in "abc"]


@pytest.fixture
def script():
    """Of the tests that ask for it: test_cfd.py has them once more, with cfd."""
    return progressive


# ----------------------------------------------------------------------------- the method


@pytest.mark.parametrize("key", KEYS)
def test_target_of_the_official_code(key):
    case = Case(key)
    torch.testing.assert_close(
        case.x, golden("x0") + expand(case.sigma, case.x) * golden("noise"), rtol=1e-12, atol=1e-12
    )
    ours = progressive.two_step_target(
        case.teacher, case.x, case.sigma, case.sigma_mid, case.sigma_end
    )
    torch.testing.assert_close(ours, case.target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "weight,official", [("constant", "x"), ("snr", "eps"), ("truncated", "both")]
)
@pytest.mark.parametrize("key", KEYS)
def test_losses_and_gradients_of_the_official_code(key, weight, official):
    """An error in eps is one in x over sigma: weight 1 / sigma^2; `both` is the larger loss."""
    case, parameters = Case(key), student_parameters()
    x0_hat = case.student(*parameters)
    torch.testing.assert_close(x0_hat.detach(), golden(f"{key}/x_pred"), rtol=1e-9, atol=1e-9)
    loss = progressive.pd_loss(x0_hat, case.target, case.sigma, weight)
    loss.backward()
    torch.testing.assert_close(
        loss.detach(), golden(f"{key}/pd_{official}_loss"), rtol=1e-9, atol=0
    )
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(
        gradients, golden(f"{key}/pd_{official}_grad_abc"), rtol=1e-8, atol=1e-9
    )


def test_snr_plus_one_is_the_error_in_v():
    x, x0_hat, target = torch.randn(
        3, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sigma = torch.tensor([0.1, 0.7, 1.0, 3.0, 50.0], dtype=torch.float64)
    errors = (v_from_x0(x0_hat, x, sigma) - v_from_x0(target, x, sigma)).square().mean()
    torch.testing.assert_close(progressive.pd_loss(x0_hat, target, sigma, "snr+1"), errors)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("key", [k for k in KEYS if k.endswith("xstart")])
def test_plain_ddim_of_the_official_code(key, stride):
    case = Case(key)
    start = golden("noise") / case.a[8]  # their x_T is unit noise in VP's variables
    x = euler(case.teacher, start, (case.s / case.a)[range(8, -1, -stride)])
    torch.testing.assert_close(
        (case.a[0] * x).clamp(-1, 1), golden(f"{key}/ddim_stride{stride}_clip0"), rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("key", KEYS[:1])
def test_one_step_to_the_target_lands_where_two_of_the_teacher_do(key):
    case = Case(key)
    for sigma, mid, end in [(80.0, 10.0, 2.0), (2.0, 1.0, 0.0), (80.0, 80.0, 5.0)]:
        x, levels = (
            sigma * case.z, [torch.full((6,), v, dtype=torch.float64) for v in (sigma, mid, end)],
        )
        target = progressive.two_step_target(case.teacher, x, *levels)
        landed = euler(
            case.teacher,
            x,
            torch.tensor([sigma, mid, end] if mid < sigma else [sigma, end]).double(),
        )
        one_step = euler(lambda x, s, target=target: target, x, torch.tensor([sigma, end]).double())
        torch.testing.assert_close(one_step, landed, rtol=1e-12, atol=1e-12)
        if end == 0:  # the official code's rule for i = 0
            middle = euler(case.teacher, x, torch.tensor([sigma, mid]).double())
            torch.testing.assert_close(target, case.teacher(middle, mid), rtol=1e-12, atol=1e-12)


class TwoSteps(nn.Module):
    """The student that PD would end with: its x0_hat at every noise level is the target."""

    def __init__(self, teacher, rows, swapped=False):
        super().__init__()
        self.teacher, self.rows, self.swapped = teacher, rows, swapped

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))
        rows = self.rows[(self.rows[:, 0] - sigma[:, None]).abs().argmin(1)]
        return progressive.two_step_target(self.teacher, x, *rows.T)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 100])
def test_the_exact_student_samples_like_the_teacher_in_half_the_steps(n):
    """n steps of it end where 2n of the teacher do; its loss is 0 unless t' and t'' are swapped."""
    case = Case(KEYS[0])
    rows = stage_levels(n, 80.0)
    student, x = TwoSteps(case.teacher, rows), 80 * golden("noise")
    ours = euler(student, x, ddim_levels(n, 80.0))
    torch.testing.assert_close(
        ours, euler(case.teacher, x, ddim_levels(2 * n, 80.0)), rtol=1e-9, atol=1e-9
    )
    sigma, mid, end = rows[torch.arange(6) % len(rows)].T
    x = golden("x0") + expand(sigma, x) * golden("noise")
    assert (
        progressive.pd_loss(
            student(x, sigma), progressive.two_step_target(case.teacher, x, sigma, mid, end), sigma
        )
        == 0
    )
    swapped = progressive.two_step_target(case.teacher, x, sigma, end.clamp(min=0.01), mid)
    assert progressive.pd_loss(student(x, sigma), swapped, sigma) > 1e-3


# ---------------------------------------------------------------------- levels and stages


@pytest.mark.parametrize("n", [1, 2, 16, 62])
def test_levels_are_the_cosine_grid_and_nest(n):
    rows, grid = stage_levels(n, 80.0), sigma_grid("cosine", 2 * n, 0.0, 80.0)
    torch.testing.assert_close(rows[:, 0], grid[:-2:2], rtol=1e-12, atol=0)
    torch.testing.assert_close(rows[:, 1], grid[1::2], rtol=1e-12, atol=0)
    torch.testing.assert_close(rows[:, 2], grid[2::2], rtol=1e-12, atol=0)
    torch.testing.assert_close(ddim_levels(2 * n, 80.0), grid, rtol=1e-12, atol=0)
    i = torch.arange(n, 0, -1).double()
    expected = [torch.tan(torch.pi / 2 * t / n).clamp(max=80) for t in (i, i - 0.5, i - 1)]
    expected[0][0] = 80.0
    torch.testing.assert_close(rows, torch.stack(expected, 1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [128, 1024, 4096, 8192])
def test_steps_above_sigma_max_are_left_out(n):
    rows = stage_levels(n, 80.0)
    t = torch.arange(n, 0, -1).double() / n
    left_out = (torch.tan(torch.pi / 2 * (t - 1 / n)) >= 80).sum().item()
    assert left_out > 0 and len(rows) == n - left_out
    assert (rows[:, 0] >= rows[:, 1]).all() and (rows[:, 1] > rows[:, 2]).all()
    assert rows[0, 0] == 80 and rows[-1, 2] == 0
    torch.testing.assert_close(
        rows[1:, 0], rows[:-1, 2], rtol=0, atol=0
    )  # each step begins where the one before it ends
    levels = ddim_levels(n, 80.0)
    assert (levels[1:] < levels[:-1]).all() and len(levels) == len(rows) + 1


def test_the_docstring_counts_the_steps_left_out():
    left_out = 8192 - len(stage_levels(8192, 80.0))
    assert f"first {left_out} of 8192" in progressive.__doc__


def test_stages_halve_and_double():
    assert halving_stages(8, 1, 10) == [(8, 10), (4, 10), (2, 20), (1, 20)]
    assert halving_stages(8, 4, 7) == [(8, 7), (4, 7)]
    assert halving_stages(2, 4, 7) == []
    paper = progressive.stages_of(progressive.Config(dataset="cifar10", device="cuda"))
    assert paper[0] == (4096, 50_000) and paper[-1] == (1, 100_000)
    assert sum(updates for _, updates in paper) == 750_000  # 11 stages of 50k and 2 of 100k
    config = progressive.Config(prediction="v", updates=5)
    assert progressive.stages_of(config)[:2] == [(16, 20), (8, 5)]


@pytest.mark.parametrize("sigma_max", [1 + 1e-7, 1.1, 3.0, 80.0, 1e5])
def test_stages_have_different_numbers_of_steps(sigma_max):
    """So that every row has its own name and NFE; below --sigma-max 1 two steps become one."""
    counts = [len(stage_levels(2**k, sigma_max)) for k in range(14)]
    assert sorted(set(counts)) == counts
    assert len(stage_levels(2, 0.9)) == 1


@pytest.mark.parametrize("prediction", ["x", "v", "eps"])
def test_predictions_mean_what_they_are_called(prediction):
    """A network that gives the true x0, v or eps of x: the denoiser gives the true x0."""
    x0, noise = torch.randn(
        2, 4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sigma = torch.tensor([0.05, 0.8, 3.0, 60.0], dtype=torch.float64)
    x = x0 + expand(sigma, x0) * noise
    truth = {"x": x0, "eps": noise, "v": v_from_x0(x0, x, sigma)}[prediction]
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, z, c_noise, labels, augment_labels):
            seen.append((z, c_noise))
            return truth

    torch.testing.assert_close(
        progressive.VPDenoiser(Net(), 0.5, prediction)(x, sigma), x0, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(seen[0][0], x / (expand(sigma, x) ** 2 + 0.25).sqrt())
    torch.testing.assert_close(seen[0][1], sigma.log() / 4)


# ------------------------------------------------------------------------------- training


class Line(nn.Module):
    """Any a(sigma) x + b(sigma) on the levels of a cosine grid: all that a Gaussian needs."""

    class net:
        img_shape, label_dim = (1, 8, 8), 0

    arch, kwargs, sigma_data = "line", {}, 0.5

    def __init__(self, n, mean, std):
        super().__init__()
        self.register_buffer("levels", ddim_levels(n, 80.0)[:-1].float())
        s2 = self.levels**2
        # of x / sqrt(1 + sigma^2), which is of one size at all levels
        self.gain = nn.Parameter(std**2 / (std**2 + s2) * (1 + s2).sqrt())
        self.offset = nn.Parameter(mean * s2 / (std**2 + s2))

    def forward(self, x, sigma, labels=None):
        sigma = torch.as_tensor(sigma, dtype=torch.float32).expand(len(x))
        at = (self.levels[:, None] - sigma).abs().argmin(0)
        gain, offset = (p[at].to(x.dtype).view(-1, 1, 1, 1) for p in (self.gain, self.offset))
        return gain * x / (1 + expand(sigma, x) ** 2).sqrt() + offset


def test_trained_on_one_gaussian_it_is_the_exact_map(tmp_path):
    """4 -> 2 -> 1 by `train`: the one-step student maps noise to where four exact steps do."""
    teacher = Line(4, 0.3, 0.4).requires_grad_(False)
    exact = copy.deepcopy(teacher)
    config = progressive.Config(
        from_steps=4, updates=500, batch_size=32, lr=0.03, clip=100.0, out=str(tmp_path),
        device="cpu",
    )
    student = progressive.train(config, teacher=teacher).requires_grad_(False)
    noise = torch.randn(
        64, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    truth = euler(exact, 80 * noise, ddim_levels(4, 80.0))
    plain = euler(exact, 80 * noise, ddim_levels(1, 80.0))
    ours = euler(student, 80 * noise, ddim_levels(1, 80.0))
    assert (ours - truth).square().mean().sqrt() < 0.02 * (plain - truth).square().mean().sqrt()
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.parameters(), exact.parameters())
    )  # not trained
    two = load_file(tmp_path / "student-2.safetensors")
    middle = copy.deepcopy(exact)
    middle.load_state_dict(two)
    ours = euler(middle, 80 * noise, ddim_levels(2, 80.0))
    assert (ours - truth).square().mean().sqrt() < 0.02 * (plain - truth).square().mean().sqrt()


def tiny_config(tiny, out, script=progressive, **more):
    """Of `script`, progressive or cfd: two stages of a few updates."""
    given = dict(from_steps=4, updates=4, batch_size=8, lr=1e-3, eval_n=32, out=str(out))
    given |= {} if script is progressive else {"cfd_from": 2}
    return script.Config(**{**given, "teacher": tiny, "device": "cpu", **more})


def plain_training(config, teacher, stages, lr, loss):
    """Progressive distillation without any of the machinery: the students {steps: denoiser}.

    lr(share of the stage that is done); loss(steps, x0_hat, x~, sigma). Gradients are clipped to
    a norm at which Adam's epsilon counts: elsewhere Adam undoes any constant factor.
    """
    torch.manual_seed(config.seed)
    stream = Stream(load_dataset("digits"), config.batch_size, config.seed, config.flip)
    student, students = copy.deepcopy(teacher).requires_grad_(True), {}
    for n, updates in stages:
        frozen = copy.deepcopy(student).requires_grad_(False)
        optimizer = torch.optim.Adam(student.parameters(), fused=True)
        for step in range(updates):
            x0, labels = stream.next()
            noise = torch.randn(x0.shape)
            i = torch.randint(n, (len(x0),))
            t = torch.stack([1 - (i + k / 2) / n for k in range(3)]).double()
            levels = torch.tan(torch.pi / 2 * t).clamp(max=config.sigma_max)
            levels[0, i == 0] = config.sigma_max
            sigma, middle, end = levels.float()
            x = x0 + sigma.view(-1, 1, 1, 1) * noise
            target = progressive.two_step_target(
                partial(frozen, labels=labels), x, sigma, middle, end
            )
            optimizer.zero_grad()
            loss(n, student(x, sigma, labels), target, sigma).backward()
            gradients = [p.grad for p in student.parameters()]
            norm = sum(g.double().square().sum() for g in gradients).sqrt().item()
            assert norm > 10 * config.clip
            for gradient in gradients:
                gradient *= config.clip / norm
            optimizer.param_groups[0]["lr"] = config.lr * lr(step / updates)
            optimizer.step()
        students[n] = copy.deepcopy(student)
    return students


UNUSUAL = dict(seed=3, flip=True, clip=1e-6, sigma_max=40.0, lr=3e-2, updates=3)  # no defaults


def assert_same_students(students, folder, initial):
    """Those that a run left in `folder`, and not as they were at first."""
    for n, student in students.items():
        weights, before = load_file(folder / f"student-{n}.safetensors"), initial.state_dict()
        ours, plain, start = (
            torch.cat([d[k].flatten() for k in sorted(weights)])
            for d in (weights, student.state_dict(), before)
        )
        assert (ours - plain).norm() < 1e-3 * (plain - start).norm(), n


def test_training_is_a_plain_loop(tmp_path):
    path = tiny_teacher(tmp_path / "tiny.safetensors", label_dim=10)
    config = tiny_config(path, tmp_path / "run", weight="snr+1", **UNUSUAL)
    teacher = load_teacher(path, "digits", torch.device("cpu"))
    progressive.train(config, teacher=teacher)  # loading one draws random numbers

    def loss(n, x0_hat, target, sigma):
        return ((1 / sigma**2 + 1) * (x0_hat - target).square().mean((1, 2, 3))).mean()

    students = plain_training(config, teacher, [(2, 6), (1, 6)], lambda done: 1 - done, loss)
    assert_same_students(students, tmp_path / "run", teacher)


def test_the_student_starts_as_the_teacher_without_dropout(tiny):
    teacher = load_teacher(tiny, "digits", torch.device("cpu"))
    student = progressive.make_student(teacher)
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0, 80.0])
    assert torch.equal(student(x, sigma), teacher(x, sigma)) and torch.equal(
        student(x, sigma), student(x, sigma)
    )
    assert all(p.requires_grad for p in student.parameters()) and not any(
        p.requires_grad for p in teacher.parameters()
    )


@pytest.mark.parametrize("more, at", [({}, 11), ({"prediction": "v"}, 19)])
def test_resumed_training_equals_an_uninterrupted_one_bitwise(
    tiny, tmp_path, monkeypatch, more, at
):
    """Cut in the middle of a stage whose teacher is a student: it is in the checkpoint too."""
    whole = progressive.train(tiny_config(tiny, tmp_path / "whole", **more))
    config = tiny_config(tiny, tmp_path / "cut", **more)
    ends = np.cumsum([updates for _, updates in progressive.stages_of(config)])
    assert ends[-2 if not more else -3] < at < ends[-1 if not more else -2]
    watch(monkeypatch, progressive, "pd_loss", fails_at=at + 1)
    with pytest.raises(ZeroDivisionError):
        progressive.train(config, Run("progressive", config, checkpoint_seconds=0))
    config.resume = True
    run = Run("progressive", config)
    assert run.restored["step"] == at
    resumed = progressive.train(config, run)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    for name in ("student-2.safetensors", "student-1.safetensors"):
        a, b = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_another_prediction_starts_near_the_teacher_where_noise_is_low(tiny, prediction):
    """There all predictions agree, up to the sign of the network's output."""
    teacher = load_teacher(tiny, "digits", torch.device("cpu"))
    student = progressive.make_student(teacher, prediction)
    x, sigma = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 0.002
    assert (student(x, sigma) - teacher(x, sigma)).norm() < 0.1 * (teacher(x, sigma) - x).norm()
    again = load_teacher(tiny, "digits", torch.device("cpu"))
    assert torch.equal(again(x, sigma), teacher(x, sigma))  # the teacher is as it was


def test_every_stage_starts_from_the_one_before(tiny, tmp_path, monkeypatch):
    """The second stage alone, from the 2-step student, begins where the first one ended."""
    progressive.train(tiny_config(tiny, tmp_path / "run"))
    path = str(tmp_path / "run" / "student-2.safetensors")
    student = load_teacher(path, "digits", torch.device("cpu"))
    by_student, original = [], progressive.two_step_target  # was it the teacher, in each call?

    def spy(teacher, x, *levels):
        parameters = teacher.func.parameters()  # without the labels
        by_student.append(all(torch.equal(a, b) for a, b in zip(parameters, student.parameters())))
        return original(teacher, x, *levels)

    monkeypatch.setattr(progressive, "two_step_target", spy)
    config = tiny_config(path, tmp_path / "part", from_steps=2)
    assert progressive.stages_of(config) == [(1, 8)]
    progressive.train(config)
    assert by_student == [True] * 8  # the teacher of the stage is frozen
    by_student.clear()
    progressive.train(tiny_config(tiny, tmp_path / "again"))
    assert by_student == [False] * 8 + [True] * 8


def test_a_conditional_teacher_and_its_student_see_the_labels_of_the_images(tmp_path, monkeypatch):
    config = tiny_config(
        tiny_teacher(tmp_path / "tiny.safetensors", label_dim=10), tmp_path / "run", to_steps=2
    )
    stream = Stream(load_dataset("digits"), 8, config.seed)
    labels = [stream.next()[1] for _ in range(8)]
    calls = watch(monkeypatch, Denoiser, "forward")
    progressive.train(config)
    assert len(calls) == 24  # an update evaluates the teacher twice, the student once
    assert all(torch.equal(call[3], labels[i // 3]) for i, call in enumerate(calls))


def test_the_teacher_sees_data_with_noise_of_its_level(script, tiny, tmp_path, monkeypatch):
    calls = watch(monkeypatch, script, "two_step_target")
    script.train(tiny_config(tiny, tmp_path, script, to_steps=2, nfe=2, batch_size=64))
    x, sigma, sigma_mid, sigma_end = map(torch.cat, list(zip(*calls))[1:])
    assert set(sigma.tolist()) == {80.0, 1.0}
    assert (sigma > sigma_mid).all() and (sigma_mid > sigma_end).all()
    assert 78 < x[sigma == 80].std() < 82
    assert 0.9 < (x[sigma == 1].std() ** 2 - 0.57**2).sqrt() < 1.2


def test_another_prediction_is_first_translated(tiny, tmp_path, monkeypatch):
    """The first stage regresses onto the teacher itself, at four times the rate."""
    teacher = load_teacher(tiny, "digits", torch.device("cpu"))
    outputs, rates, step = [], [], torch.optim.Adam.step
    teacher.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    losses = watch(monkeypatch, progressive, "pd_loss")

    def spy_step(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    config = tiny_config(tiny, tmp_path, prediction="v", to_steps=2, updates=2, lr=1e-3)
    progressive.train(config, teacher=teacher)
    assert len(outputs) == 8
    assert all(torch.equal(output, target) for output, (_, target, *_) in zip(outputs, losses))
    first, second = [4e-3 * (1 - k / 8) for k in range(8)], [1e-3 * (1 - k / 4) for k in range(4)]
    np.testing.assert_allclose(rates, first + second)


def pd_gradient(n, rows=32):
    """The gradient of the first update of the n-step stage, on the shipped teacher, flat."""
    teacher = load_teacher(None, "digits", torch.device("cpu"))
    student = progressive.make_student(teacher)
    generator = torch.Generator().manual_seed(0)
    levels = stage_levels(n, 80.0).float()
    i = torch.randint(len(levels), (rows,), generator=generator)
    sigma, mid, end = levels[i].unbind(1)
    x0, _ = Stream(load_dataset("digits"), rows, 0).next()
    x = x0 + expand(sigma, x0) * torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        target = progressive.two_step_target(teacher, x, sigma, mid, end)
    progressive.pd_loss(student(x, sigma), target, sigma).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def test_bfloat16_loses_the_gradient_at_many_steps():
    """Why both scripts train in float32: there two steps of the teacher are almost its one."""
    cosines = []
    for n in (8, 512):
        exact = pd_gradient(n)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = pd_gradient(n)
        cosines.append(torch.cosine_similarity(exact, rounded, dim=0).item())
    assert cosines[0] > 0.9 and cosines[1] < 0.7, cosines


def test_losses_are_float32_where_others_use_bfloat16(script, tiny, tmp_path, monkeypatch):
    names = [name for name in ("pd_loss", "cfd_loss") if hasattr(script, name)]
    seen = calls_under_bfloat16(monkeypatch, script, *names)
    script.train(tiny_config(tiny, tmp_path, script, updates=1))
    assert seen == [False] * 4


# ----------------------------------------------------------------------- the command line

run_main = partial(run_script, progressive)


def test_smoke_leaves_everything_behind(script, monkeypatch, tmp_path, tiny, capsys):
    command = ("--smoke", "--device", "cpu", "--teacher", tiny, "--out", tmp_path)
    run_script(script, monkeypatch, *command)
    rows, last = results(tmp_path), "pd" if script is progressive else "cfd"
    assert [(row["name"].split(" ")[0], row["nfe"]) for row in rows] == [
        *(("ddim", 4), ("ddim-edm", 4), ("untrained", 4)),
        *(("ddim", 2), ("ddim-edm", 2), ("untrained", 2), ("pd", 2)),
        *(("ddim", 1), ("ddim-edm", 1), ("untrained", 1), (last, 1), ("teacher", 35)),
    ]
    for row in rows:
        assert math.isfinite(row["fid"]) and row["fid_n"] == 32
        assert math.isfinite(row["fid_unseen"]) and "seed1" in row["fid_unseen_features"]
        assert row["fid_features"] == "digits-classifier"
    assert {p.name for p in tmp_path.iterdir()} == {
        "metrics.json", "samples.png", "samples.npz", "errors.npz", "fid.png", "log.jsonl",
        "checkpoint.pt", "student-2.safetensors", "student-1.safetensors",
    }
    by_name = {(row["name"], row["nfe"]): row["rmse_to_teacher"] for row in rows}
    assert by_name["ddim", 4] < by_name["ddim", 1] and by_name["teacher", 35] == 0
    first = capsys.readouterr().out.split("name ", 1)[1].splitlines()[1:13]
    meanings = losses.save_losses(tmp_path, script.__name__)
    assert meanings[0].startswith("loss: ") and (tmp_path / "losses.png").stat().st_size > 5000
    assert list(losses.curves_of(tmp_path)) == ["2-step student", "1-step student"]
    run_script(script, monkeypatch, *command, "--resume")  # only measures
    assert capsys.readouterr().out.split("name ", 1)[1].splitlines()[1:13] == first


def test_a_student_can_be_sampled_later(monkeypatch, tmp_path, tiny):
    run_main(monkeypatch, "--smoke", "--device", "cpu", "--out", tmp_path / "a", "--teacher", tiny)
    student = tmp_path / "a" / "student-1.safetensors"
    more = "--teacher", student, "--from-steps", 1, "--nfe", 1
    run_main(monkeypatch, "--smoke", "--device", "cpu", "--out", tmp_path / "b", *more)
    a, b = (results(tmp_path / k) for k in "ab")
    ours = next(r for r in a if (r["name"], r["nfe"]) == ("pd", 1))
    again = next(r for r in b if (r["name"], r["nfe"]) == ("ddim", 1))  # no training at all
    assert ours["fid"] == again["fid"] and "pd" not in [r["name"] for r in b]


def test_a_network_of_another_prediction_is_no_teacher(monkeypatch, tmp_path, tiny):
    more = "--teacher", tiny, "--prediction", "eps"
    run_main(monkeypatch, "--smoke", "--device", "cpu", "--out", tmp_path, *more)
    rows = results(tmp_path)
    assert [r["nfe"] for r in rows if r["name"] == "pd"] == [4, 2, 1]
    with pytest.raises(UsageError, match="eps-predicting student"):
        load_teacher(str(tmp_path / "student-1.safetensors"), "digits", torch.device("cpu"))
    with pytest.raises(UsageError):
        progressive.read_student(
            tmp_path / "nothing.pt", load_teacher(tiny, "digits", torch.device("cpu"))
        )


@pytest.mark.parametrize(
    "arguments,names",
    [
        (["--from-steps", "12"], ["--from-steps 12", "power of 2"]),
        (["--from-steps", "2", "--to-steps", "4"], ["--from-steps 2", "4"]),
        (["--to-steps", "0"], ["--to-steps 0"]), (["--nfe", "3"], ["--nfe 3", "16, 8, 4, 2, 1"]),
        (["--updates", "0"], ["--updates 0"]), (["--lr", "-1"], ["--lr -1"]),
        (["--sigma-max", "0"], ["--sigma-max 0"]),
        (["--sigma-max", "0.4"], ["--sigma-max 0.4", "above 1"]),
        (["--sigma-max", "inf"], ["--sigma-max inf"]),
        (["--prediction", "score"], ["prediction", "score"]),
        (["--precision", "bf16"], ["--precision bf16", "float32"]),
        (["--weight", "none"], ["weight", "none"]), (["--teacher", "FOREIGN"], ["foreign.pt"]),
        (["--dataset", "cifar10"], ["dataset", "cifar10"]), (["--resume"], ["checkpoint.pt"]),
        (["--device", "cuda:99"], ["--device cuda:99"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    assert_refused(progressive, monkeypatch, tmp_path, arguments, names)
