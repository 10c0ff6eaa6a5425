"""cfd.py against the official code (golden/README.md, 5), progressive.py, closed forms."""

import inspect
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cfd
import progressive
from common import UsageError
from common.classifier import load_classifier
from common.machinery.run import Run
from common.teacher import load_teacher
from scripts import assert_refused, calls_under_bfloat16, run_script
from test_progressive import FILE, KEYS, Case, golden, student_parameters, tiny  # noqa: F401

ROOT = Path(__file__).parent.parent
SETTINGS = [
    (run["key"], j, s)
    for run in json.loads(str(FILE["config"]))["runs"]
    for j, s in enumerate(run["rcfd"])
]


def golden_classifier(x):
    features = 2 * torch.tanh(x.flatten(1) @ golden("cls_w1") + golden("cls_b1"))
    return features, features @ golden("cls_w2") + golden("cls_b2")


# ------------------------------------------------------------ what stands in both scripts

SHARED = ("stage_levels", "ddim_levels", "two_step_target", "plan", "make_samplers")


@pytest.mark.parametrize("name", SHARED)
def test_shared_functions_have_one_source_text(name):
    ours, theirs = (inspect.getsource(getattr(script, name)) for script in (cfd, progressive))
    assert ours == theirs and getattr(cfd, name) is not getattr(progressive, name)


def test_shared_functions_agree():
    """The two scripts import nothing from each other, and compute the same."""
    assert "progressive" not in vars(cfd) and "cfd" not in vars(progressive)
    case = Case(KEYS[0])
    levels = case.sigma, case.sigma_mid, case.sigma_end
    ours, theirs = (s.two_step_target(case.teacher, case.x, *levels) for s in (cfd, progressive))
    assert torch.equal(ours, theirs)
    guess = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    for sigma in (case.sigma, torch.logspace(-2, 2, len(guess), dtype=torch.float64)):
        losses = [script.pd_loss(guess, ours, sigma) for script in (cfd, progressive)]
        assert torch.equal(*losses) and losses[0] > 0
    for n, sigma_max in ((1, 80.0), (7, 80.0), (512, 80.0), (4, 2.0)):
        for name in ("stage_levels", "ddim_levels"):
            a, b = (getattr(script, name)(n, sigma_max) for script in (cfd, progressive))
            assert torch.equal(a, b)
    for plan in ((512, 1, 10), (8, 4, 7), (2, 4, 7)):
        assert cfd.plan(*plan) == progressive.plan(*plan)


# ----------------------------------------------------------------------------- the method


@pytest.mark.parametrize("key,j,official", SETTINGS)
def test_loss_and_gradients_of_the_official_code(key, j, official):
    """Their alpha and beta are the paper's beta and gamma."""
    case, parameters = Case(key), student_parameters()
    loss = cfd.cfd_loss(
        golden_classifier,
        case.student(*parameters),
        case.target,
        official["temp"],
        official["alpha"],
        official["beta"],
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden(f"{key}/rcfd{j}_loss"), rtol=1e-9, atol=1e-12)
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(gradients, golden(f"{key}/rcfd{j}_grad_abc"), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("key,j,official", SETTINGS)
def test_terms_of_the_official_code(key, j, official):
    """KL alone is beta = 0; entropy and diversity are what gamma = 1 and 0 add to it."""
    case = Case(key)
    x0_hat = case.student(*student_parameters()).detach()
    kl, entropy, diversity = (
        cfd.cfd_loss(golden_classifier, x0_hat, case.target, official["temp"], *weights)
        for weights in ((0, 0), (1, 1), (1, 0))
    )
    for ours, name in ((kl, "feat"), (entropy - kl, "entropy"), (diversity - kl, "div")):
        torch.testing.assert_close(ours, golden(f"{key}/rcfd{j}_{name}"), rtol=1e-9, atol=1e-11)


def test_zero_where_nothing_differs_and_tau_sharpens_the_teacher_alone():
    case = Case(KEYS[0])
    x = case.target
    assert cfd.cfd_loss(golden_classifier, x, x, 1.0, 0.0, 0.0).abs() < 1e-12
    f = golden_classifier(x)[0]
    p = (f / 0.5).softmax(1)
    expected = (p * (p.log() - f.softmax(1).log())).sum(1).mean()
    assert expected > 1e-3
    torch.testing.assert_close(cfd.cfd_loss(golden_classifier, x, x, 0.5, 0.0, 0.0), expected)
    sharper = (f / 0.5, golden_classifier(x)[1])  # a student with these features has no loss

    def classifier(image):
        return sharper if image is x else golden_classifier(image)

    zero = torch.zeros((), dtype=torch.float64)
    ours = cfd.cfd_loss(classifier, x, x.clone(), 0.5, 0.0, 0.0)
    torch.testing.assert_close(ours, zero, rtol=0, atol=1e-12)


def test_certain_predictions_have_no_nan():
    """The official p log p is NaN where p underflows; entropy is 0, diversity -log(2 classes)."""
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [0.0, 1000.0, -1000.0]]).requires_grad_(True)
    features = torch.zeros(2, 4)
    loss = cfd.cfd_loss(lambda x: (features, logits), features, features, 1.0, 1.0, 0.5)
    loss.backward()
    torch.testing.assert_close(
        loss.detach(), torch.tensor(-0.5 * math.log(2)), rtol=1e-5, atol=1e-6
    )
    assert logits.grad.isfinite().all()


def test_entropy_pulls_to_one_class_and_diversity_to_all():
    logits = torch.zeros(2, 3).requires_grad_(True)
    with torch.no_grad():
        logits[:, 0] = 1.0  # both images lean to class 0
    features = torch.zeros(2, 4)
    # descent raises the leading class for entropy and lowers it for diversity
    for gamma, sign in ((1.0, -1), (0.0, 1)):
        (gradient,) = torch.autograd.grad(
            cfd.cfd_loss(lambda x: (features, logits), features, features, 1.0, 1.0, gamma), logits
        )
        assert (sign * gradient[:, 0] > 0).all()


def test_the_gradient_reaches_the_student_alone():
    classifier = load_classifier("digits", torch.device("cpu"))
    x0_hat, target = (
        torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(k)).requires_grad_(True)
        for k in (0, 1)
    )
    cfd.cfd_loss(classifier, x0_hat, target, 0.9, 0.003, 0.75).backward()
    assert target.grad is None and x0_hat.grad.abs().sum() > 0 and not classifier.training
    assert all(p.grad is None for p in classifier.parameters())


def test_a_classifier_of_imagenet_and_where_it_cannot_be_had(monkeypatch):
    config = cfd.Config(classifier="imagenet-lite0")
    features, logits = cfd.make_classifier(config, "cpu")(torch.zeros(2, 1, 8, 8))
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)

    def offline(*arguments, **more):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.get_model", offline)
    config = cfd.Config(classifier="imagenet-resnet18")
    message = "^--classifier imagenet-resnet18: no network; .*, or take --classifier own$"
    with pytest.raises(UsageError, match=message):
        cfd.make_classifier(config, "cpu")


# ------------------------------------------------------------------------------- training


def tiny_config(tiny, out, **more):  # noqa: F811
    return cfd.Config(
        **{
            "teacher": tiny,
            "from_steps": 4,
            "cfd_from": 2,
            "updates": 3,
            "batch_size": 8,
            "lr": 1e-3,
            "eval_n": 32,
            "out": str(out),
            "device": "cpu",
            **more,
        }
    )


def stage_weights(folder, n):
    return load_file(Path(folder) / f"student-{n}.safetensors")


def test_pd_first_then_features(tiny, tmp_path, monkeypatch):  # noqa: F811
    used = []
    for name in ("pd_loss", "cfd_loss"):
        original = getattr(cfd, name)
        monkeypatch.setattr(
            cfd, name, lambda *a, name=name, original=original: used.append(name) or original(*a)
        )
    cfd.train(tiny_config(tiny, tmp_path))
    assert (
        used == ["pd_loss"] * 6 + ["cfd_loss"] * 6
    )  # students of 2 steps and of 1, six updates each


def test_losses_are_float32_where_others_use_bfloat16(tiny, tmp_path, monkeypatch):  # noqa: F811
    """test_progressive.py shows why."""
    seen = calls_under_bfloat16(monkeypatch, cfd, "pd_loss", "cfd_loss")
    cfd.train(tiny_config(tiny, tmp_path, updates=1))
    assert seen == [False] * 4


def test_rates_fall_along_a_cosine_and_every_stage_starts_from_the_one_before(
    tiny, tmp_path, monkeypatch  # noqa: F811
):
    rates, ages, step = [], [], torch.optim.Adam.step

    def spy(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        ages.append(max([int(s["step"]) for s in self.state.values()], default=0))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    teachers, original = [], cfd.two_step_target

    def keep(teacher, *arguments):
        weights = teacher.func.state_dict()  # teacher: with the labels
        teachers.append({k: v.clone() for k, v in weights.items()})
        return original(teacher, *arguments)

    monkeypatch.setattr(cfd, "two_step_target", keep)
    cfd.train(tiny_config(tiny, tmp_path, lr=2.0, updates=2))
    expected = [1 + math.cos(math.pi * k / 4) for k in range(4)]
    torch.testing.assert_close(rates, expected * 2)
    assert ages == [0, 1, 2, 3] * 2
    two = stage_weights(tmp_path, 2)
    first = load_teacher(tiny, "digits", torch.device("cpu")).state_dict()
    assert all(torch.equal(seen[k], first[k]) for seen in teachers[:4] for k in first)
    assert all(torch.equal(seen[k], two[k]) for seen in teachers[4:] for k in two)


def test_the_teacher_sees_data_with_noise_of_its_level(tiny, tmp_path, monkeypatch):  # noqa: F811
    seen, original = [], cfd.two_step_target

    def spy(teacher, x, *levels):
        seen.append((x, *levels))
        return original(teacher, x, *levels)

    monkeypatch.setattr(cfd, "two_step_target", spy)
    cfd.train(tiny_config(tiny, tmp_path, to_steps=2, nfe=2, batch_size=64))
    x, sigma, sigma_mid, sigma_end = map(torch.cat, zip(*seen))
    assert set(sigma.tolist()) == {80.0, 1.0}
    assert (sigma > sigma_mid).all() and (sigma_mid > sigma_end).all()
    assert 78 < x[sigma == 80].std() < 82
    assert 0.9 < (x[sigma == 1].std() ** 2 - 0.57**2).sqrt() < 1.2


def test_it_goes_on_from_a_run_of_progressive(tiny, tmp_path, monkeypatch):  # noqa: F811
    pd = progressive.Config(
        teacher=tiny,
        from_steps=4,
        updates=3,
        batch_size=8,
        eval_n=32,
        out=str(tmp_path / "pd"),
        device="cpu",
    )
    progressive.train(pd)
    teachers, original = [], cfd.two_step_target
    monkeypatch.setattr(
        cfd,
        "two_step_target",
        lambda teacher, *a: teachers.append(teacher.func) or original(teacher, *a),
    )
    config = tiny_config(tiny, tmp_path / "cfd", pd=str(tmp_path / "pd"))
    assert cfd.stages_of(config) == [(1, 6)]
    cfd.train(config)
    two, pd_one, one = (
        stage_weights(tmp_path / "pd", 2),
        stage_weights(tmp_path / "pd", 1),
        stage_weights(tmp_path / "cfd", 1),
    )
    assert all(torch.equal(v, two[k]) for k, v in teachers[0].state_dict().items())
    assert any(not torch.equal(one[k], pd_one[k]) for k in one) and any(
        not torch.equal(one[k], two[k]) for k in one
    )


def test_resumed_training_equals_an_uninterrupted_one_bitwise(
    tiny, tmp_path, monkeypatch  # noqa: F811
):
    more = dict(beta=0.003, tau=0.95)
    whole = cfd.train(tiny_config(tiny, tmp_path / "whole", **more))
    config, original, calls = tiny_config(tiny, tmp_path / "cut", **more), cfd.cfd_loss, []

    def crash(*arguments):
        calls.append(1)
        return original(*arguments) if len(calls) < 3 else 1 / 0

    monkeypatch.setattr(cfd, "cfd_loss", crash)
    with pytest.raises(ZeroDivisionError):
        cfd.train(config, Run("cfd", config, checkpoint_seconds=0))
    monkeypatch.setattr(cfd, "cfd_loss", original)
    config.resume = True
    run = Run("cfd", config)
    assert run.restored["step"] == 8
    resumed = cfd.train(config, run)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert all(
        torch.equal(v, stage_weights(tmp_path / "cut", 1)[k])
        for k, v in stage_weights(tmp_path / "whole", 1).items()
    )


# ----------------------------------------------------------------------- the command line

run_main = partial(run_script, cfd)


def test_smoke_leaves_everything_behind(monkeypatch, tmp_path):
    run_main(monkeypatch, "--smoke", "--device", "cpu", "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [(r["name"], r["nfe"]) for r in metrics["results"]] == [
        ("ddim", 4),
        ("ddim-edm", 4),
        ("ddim", 2),
        ("ddim-edm", 2),
        ("pd", 2),
        ("ddim", 1),
        ("ddim-edm", 1),
        ("cfd", 1),
        ("teacher", 35),
    ]
    assert all(
        math.isfinite(r["fid"]) and math.isfinite(r["fid_unseen"]) and r["fid_n"] == 32
        for r in metrics["results"]
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        "metrics.json",
        "samples.png",
        "samples.npz",
        "errors.npz",
        "fid.png",
        "log.jsonl",
        "checkpoint.pt",
        "student-2.safetensors",
        "student-1.safetensors",
    }


def test_with_pd_both_are_measured(monkeypatch, tmp_path, tiny):  # noqa: F811
    pd = progressive.Config(
        teacher=tiny,
        from_steps=4,
        updates=2,
        batch_size=8,
        eval_n=32,
        out=str(tmp_path / "pd"),
        device="cpu",
    )
    progressive.train(pd)
    run_main(
        monkeypatch,
        "--smoke",
        "--device",
        "cpu",
        "--out",
        tmp_path / "cfd",
        "--teacher",
        tiny,
        "--pd",
        tmp_path / "pd",
    )
    rows = json.loads((tmp_path / "cfd" / "metrics.json").read_text())["results"]
    assert [(r["name"], r["nfe"]) for r in rows if r["name"] in ("pd", "cfd")] == [
        ("pd", 2),
        ("pd", 1),
        ("cfd", 1),
    ]
    fid = {(r["name"], r["nfe"]): r["fid"] for r in rows}
    assert fid["pd", 1] != fid["cfd", 1]


@pytest.mark.parametrize(
    "prediction, other, said",
    [
        ("v", False, "holds a v-predicting student, not a teacher"),
        ("edm", True, "another teacher"),
    ],
)
def test_pd_of_another_kind_is_refused(
    monkeypatch, tmp_path, tiny, capsys, prediction, other, said  # noqa: F811
):
    """A network that predicts v, taken for a denoiser, would run without complaint."""
    progressive.train(
        progressive.Config(
            teacher=tiny,
            from_steps=4,
            updates=1,
            batch_size=4,
            out=str(tmp_path / "pd"),
            device="cpu",
            prediction=prediction,
        )
    )
    with pytest.raises(UsageError, match=f"student-2.safetensors.*{said}"):
        run_main(
            monkeypatch,
            "--smoke",
            "--device",
            "cpu",
            "--out",
            tmp_path / "cfd",
            "--pd",
            tmp_path / "pd",
            *(() if other else ("--teacher", tiny)),
        )


@pytest.mark.parametrize(
    "arguments,names",
    [
        (["--from-steps", "24"], ["--from-steps 24", "power of 2"]),
        (["--cfd-from", "32"], ["--cfd-from 32", "8, 4, 2, 1"]),
        (["--cfd-from", "3"], ["--cfd-from 3"]),
        (["--tau", "0"], ["--tau 0"]),
        (["--beta", "-1"], ["--beta -1"]),
        (["--gamma", "1.5"], ["--gamma 1.5"]),
        (["--classifier", "clip"], ["classifier", "clip"]),
        (["--pd", "NOWHERE"], ["student-8.safetensors"]),
        (["--nfe", "5"], ["--nfe 5"]),
        (["--teacher", "FOREIGN"], ["foreign.pt"]),
        (["--dataset", "cifar10"], ["teacher", "cifar10"]),
        (["--resume"], ["checkpoint.pt"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    assert_refused(cfd, monkeypatch, tmp_path, arguments, names, NOWHERE=tmp_path / "nowhere")


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path, tiny):  # noqa: F811
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for k in (1, 2):
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={k}"]
            if k > 1
            else []
        )
        subprocess.run(
            [
                sys.executable,
                *launcher,
                "cfd.py",
                "--device",
                "cpu",
                "--teacher",
                tiny,
                "--from-steps",
                "4",
                "--cfd-from",
                "2",
                "--updates",
                "4",
                "--batch-size",
                "16",
                "--eval-n",
                "16",
                "--out",
                str(tmp_path / str(k)),
            ],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
        )
    a, b = (stage_weights(tmp_path / str(k), 1) for k in (1, 2))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_short_training_beats_ddim(tmp_path):
    """Digits, 8 -> 4 in 100 updates by features alone: a lower FID than 4 DDIM steps, also in
    features that the loss has not seen.
    """
    subprocess.run(
        [
            sys.executable,
            "cfd.py",
            "--device",
            "cpu",
            "--from-steps",
            "8",
            "--to-steps",
            "4",
            "--updates",
            "100",
            "--nfe",
            "4",
            "--eval-n",
            "512",
            "--out",
            str(tmp_path),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    rows = json.loads((tmp_path / "metrics.json").read_text())["results"]
    for space in ("fid", "fid_unseen"):
        fid = {r["name"]: r[space] for r in rows}
        assert fid["cfd"] < 0.8 * min(fid["ddim"], fid["ddim-edm"]), fid
