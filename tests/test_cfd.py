"""cfd.py against the official code (golden/README.md, 5), progressive.py, closed forms."""

import inspect
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cfd
import progressive
from common import UsageError, solvers
from common.baselines import best_untrained, solver_name
from common.classifier import load_classifier
from common.diffusion import Denoiser, sigma_grid
from common.machinery import ranks
from common.machinery.run import Run
from common.teacher import load_teacher
from scripts import assert_refused, differences, results, run_script, tiny_teacher, watch
from test_progressive import (  # noqa: F401
    FILE, KEYS, UNUSUAL, Case, assert_same_students, golden, plain_training, student_parameters,
    test_losses_are_float32_where_others_use_bfloat16, test_smoke_leaves_everything_behind,
    test_the_teacher_sees_data_with_noise_of_its_level, tiny_config,
)

ROOT = Path(__file__).parent.parent
SETTINGS = [
    (run["key"], j, s)
    for run in json.loads(str(FILE["config"]))["runs"]
    for j, s in enumerate(run["rcfd"])
]


@pytest.fixture
def script():
    """Of the tests that are also progressive's."""
    return cfd


def golden_classifier(x):
    features = 2 * torch.tanh(x.flatten(1) @ golden("cls_w1") + golden("cls_b1"))
    return features, features @ golden("cls_w2") + golden("cls_b2")


# ------------------------------------------------------------ what stands in both scripts

@pytest.mark.parametrize("name", ["two_step_target", "sample"])
def test_shared_functions_have_one_source_text(name):
    ours, theirs = (inspect.getsource(getattr(script, name)) for script in (cfd, progressive))
    assert ours == theirs and getattr(cfd, name) is not getattr(progressive, name)


def test_the_losses_by_pixels_agree():
    target, guess = torch.rand(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    sigma = torch.logspace(-2, 2, len(guess))
    losses = [script.pd_loss(guess, target, sigma) for script in (cfd, progressive)]
    assert torch.equal(*losses) and losses[0] > 0


# ----------------------------------------------------------------------------- the method


@pytest.mark.parametrize("key,j,official", SETTINGS)
def test_loss_and_gradients_of_the_official_code(key, j, official):
    """Their alpha and beta are the paper's beta and gamma."""
    case, parameters = Case(key), student_parameters()
    loss = cfd.cfd_loss(
        golden_classifier, case.student(*parameters), case.target, official["temp"],
        official["alpha"], official["beta"],
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
    message = r"^--classifier imagenet-resnet18: .*\(no network\); .*, or take --classifier own$"
    with pytest.raises(UsageError, match=message):
        cfd.make_classifier(config, "cpu")


# ------------------------------------------------------------------------------- training


def stage_weights(folder, n):
    return load_file(Path(folder) / f"student-{n}.safetensors")


@pytest.fixture(scope="module")
def classifier():
    """Of ten classes, sure of none: entropy and diversity have something to say."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.Tanh())
    head = torch.nn.Linear(5, 10).requires_grad_(False)
    net.requires_grad_(False)

    def features_and_logits(x):
        features = 3 * net(x)
        return features, head(features)

    return features_and_logits


def test_training_is_a_plain_loop(tmp_path, classifier):
    path = tiny_teacher(tmp_path / "tiny.safetensors", label_dim=10)
    weights = dict(beta=0.5, gamma=0.2, tau=0.5)
    config = tiny_config(path, tmp_path / "run", cfd, **weights, **UNUSUAL)
    teacher = load_teacher(path, "digits", torch.device("cpu"))
    cfd.train(config, teacher=teacher, classifier=classifier)

    def loss(n, x0_hat, target, sigma):
        if n == 2:
            weight = torch.maximum(1 / sigma**2, torch.ones(()))
            return (weight * (x0_hat - target).square().mean((1, 2, 3))).mean()
        goal = (classifier(target)[0] / 0.5).softmax(1)
        features, logits = classifier(x0_hat)
        kl = (goal * (goal.log() - features.softmax(1).log())).sum(1).mean()
        p = logits.softmax(1)
        entropy, mean = -(p * p.log()).sum(1).mean(), p.mean(0)
        return kl + 0.5 * (0.2 * entropy + 0.8 * (mean * mean.log()).sum())

    students = plain_training(
        config, teacher, [(2, 6), (1, 6)], lambda done: (1 + math.cos(math.pi * done)) / 2, loss
    )
    assert_same_students(students, tmp_path / "run", teacher)


def test_diversity_is_of_the_images_of_all_ranks(monkeypatch):
    """Simulated: each of two ranks has half of the batch; their mean gradient is the whole's."""
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(rows):
        rows = rows.clone().requires_grad_(True)
        features = torch.zeros(len(rows), 2)
        cfd.cfd_loss(lambda x: (features, rows), features, features, 1.0, 0.7, 0.3).backward()
        return rows.grad

    def all_gather(parts, rows):
        for part, others in zip(parts, logits.log_softmax(1).split(3)):
            part.copy_(others)

    whole = gradient(logits)
    for rank in range(2):
        monkeypatch.setattr(ranks, "rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(ranks.dist, "all_gather", all_gather)
        ours = slice(3 * rank, 3 * rank + 3)
        torch.testing.assert_close(gradient(logits[ours]) / 2, whole[ours])


def test_diversity_is_not_cut_into_micro_batches(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, cfd, beta=0.1, batch_per_gpu=4)
    with pytest.raises(UsageError, match="--batch-per-gpu 4: must be at least 8: with --beta"):
        cfd.train(config)


def test_it_goes_on_from_a_run_of_progressive(tiny, tmp_path, monkeypatch):
    progressive.train(tiny_config(tiny, tmp_path / "pd"))
    calls = watch(monkeypatch, cfd, "two_step_target")
    config = tiny_config(tiny, tmp_path / "cfd", cfd, pd=str(tmp_path / "pd"))
    assert cfd.stages_of(config) == [(1, 8)]
    cfd.train(config)
    two, pd_one, one = (stage_weights(tmp_path / run, n) for run, n in (
        ("pd", 2), ("pd", 1), ("cfd", 1)
    ))
    assert not differences(calls[0][0].func.state_dict(), two)
    assert differences(one, pd_one) and differences(one, two)


def test_resumed_training_equals_an_uninterrupted_one_bitwise(tiny, tmp_path, monkeypatch):
    more = dict(beta=0.003, tau=0.95)
    whole = cfd.train(tiny_config(tiny, tmp_path / "whole", cfd, **more))
    config = tiny_config(tiny, tmp_path / "cut", cfd, **more)
    watch(monkeypatch, cfd, "cfd_loss", fails_at=3)
    with pytest.raises(ZeroDivisionError):
        cfd.train(config, Run("cfd", config, checkpoint_seconds=0))
    config.resume = True
    run = Run("cfd", config)
    assert run.restored["step"] == 8 + 2
    resumed = cfd.train(config, run)
    assert not differences(whole.state_dict(), resumed.state_dict())
    assert not differences(*(stage_weights(tmp_path / name, 1) for name in ("whole", "cut")))


# ----------------------------------------------------------------------- the command line

run_main = partial(run_script, cfd)


def test_with_pd_both_are_measured(monkeypatch, tmp_path, tiny):
    progressive.train(tiny_config(tiny, tmp_path / "pd", updates=2))
    run_main(
        monkeypatch, "--smoke", "--device", "cpu", "--out", tmp_path / "cfd", "--teacher", tiny,
        "--pd", tmp_path / "pd",
    )
    rows = results(tmp_path / "cfd")
    assert [(r["name"], r["nfe"]) for r in rows if r["name"] in ("pd", "cfd")] == [
        ("pd", 2), ("pd", 1), ("cfd", 1),
    ]
    fid = {(r["name"], r["nfe"]): r["fid"] for r in rows}
    assert fid["pd", 1] != fid["cfd", 1]


class Measured(Exception):
    """Instead of measuring: what would have been."""


@pytest.mark.parametrize(
    "script, more",
    [(progressive, ()), (progressive, ("--prediction", "v")), (cfd, ()), (cfd, ("--pd", "PD"))],
)
def test_every_row_is_what_its_name_says(monkeypatch, tmp_path, tiny, script, more):
    """Each sampler that `main` measures: network, noise levels, evaluations and images."""
    common = "--device", "cpu", "--smoke", "--sigma-max", 40, "--teacher", tiny
    run_script(progressive, monkeypatch, *common, "--out", tmp_path / "pd")

    def stop(run, samplers, net, evaluator, reference):
        assert reference == "teacher"
        raise Measured(samplers)

    monkeypatch.setattr(script, "measure", stop)
    more = [tmp_path / "pd" if a == "PD" else a for a in more]
    with pytest.raises(Measured) as measured:
        run_script(script, monkeypatch, *common, "--out", tmp_path / "run", *more)
    rows = measured.value.args[0]
    seen, forward = [], Denoiser.forward

    def record(self, x, sigma, labels=None):
        seen.append((self, float(torch.as_tensor(sigma).flatten()[0]), labels))
        return forward(self, x, sigma, labels)

    monkeypatch.setattr(Denoiser, "forward", record)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=generator)
    teacher = load_teacher(tiny, "digits", torch.device("cpu"))
    names = set()
    for (name, nfe), sampler in rows.items():
        seen.clear()
        images = sampler(noise, None)
        assert len(seen) == nfe and len({id(network) for network, *_ in seen}) == 1, name
        network, levels = seen[0][0], [level for _, level, _ in seen]
        kind, _, how = name.partition(" (")
        names.add(kind)
        owner = teacher.state_dict()
        if kind in ("pd", "cfd"):
            at_first = kind == "pd" and more and script is cfd
            owner = stage_weights(tmp_path / ("pd" if at_first else "run"), nfe)
        ours = network.state_dict()
        assert all(torch.equal(owner[k], ours[k]) for k in owner), name
        u = torch.linspace(1, 0, nfe + 1, dtype=torch.float64)
        if kind == "teacher":
            edm = sigma_grid("edm", 17, sigma_max=40.0)
            solver, grid = solvers.heun, torch.cat([edm, torch.zeros(1)])
        elif kind == "untrained":
            best, order, hand_made = best_untrained("digits", nfe)
            assert how == f"{solver_name(best, order)}, {hand_made})"
            solver = partial(solvers.SOLVERS[best], order=order)
            grid = sigma_grid(hand_made, solvers.steps_for(best, nfe), 0.002, 40.0)
        elif kind == "ddim-edm":
            solver = solvers.euler
            grid = (0.002 ** (1 / 7) + (40 ** (1 / 7) - 0.002 ** (1 / 7)) * u) ** 7
        else:
            solver, grid = solvers.euler, torch.tan(torch.pi / 2 * u).clamp(max=40.0)
        seen.clear()
        torch.testing.assert_close(images, solver(network, 40 * noise, grid))
        torch.testing.assert_close(levels, [level for _, level, _ in seen])
        assert max(levels) == 40.0
        seen.clear()
        sampler(noise, torch.tensor([1, 2]))
        assert all(torch.equal(labels, torch.tensor([1, 2])) for *_, labels in seen)
    assert names == {"ddim", "ddim-edm", "untrained", "teacher", "pd", *(["cfd"] * (script is cfd))}


@pytest.mark.parametrize(
    "prediction, other, said",
    [
        ("v", False, "holds a v-predicting student, not a teacher"),
        ("edm", True, "another teacher"),
    ],
)
def test_pd_of_another_kind_is_refused(
    monkeypatch, tmp_path, tiny, capsys, prediction, other, said
):
    """A network that predicts v, taken for a denoiser, would run without complaint."""
    progressive.train(tiny_config(tiny, tmp_path / "pd", updates=1, prediction=prediction))
    with pytest.raises(UsageError, match=f"student-2.safetensors.*{said}"):
        run_main(
            monkeypatch, "--smoke", "--device", "cpu", "--out", tmp_path / "cfd", "--pd",
            tmp_path / "pd", *(() if other else ("--teacher", tiny)),
        )


@pytest.mark.parametrize(
    "arguments,names",
    [
        (["--from-steps", "24"], ["--from-steps 24", "power of 2"]),
        (["--cfd-from", "32"], ["--cfd-from 32", "8, 4, 2, 1"]),
        (["--cfd-from", "3"], ["--cfd-from 3"]), (["--tau", "0"], ["--tau 0"]),
        (["--beta", "-1"], ["--beta -1"]), (["--gamma", "1.5"], ["--gamma 1.5"]),
        (["--classifier", "clip"], ["classifier", "clip"]),
        (["--pd", "NOWHERE"], ["student-8.safetensors"]), (["--nfe", "5"], ["--nfe 5"]),
        (["--precision", "bf16"], ["--precision bf16", "float32"]),
        (["--teacher", "FOREIGN"], ["foreign.pt"]),
        (["--dataset", "cifar10"], ["dataset", "cifar10"]), (["--resume"], ["checkpoint.pt"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    assert_refused(cfd, monkeypatch, tmp_path, arguments, names, NOWHERE=tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("script, name, spaces, factor", [
    ("progressive.py", "pd", ["fid"], 0.6),
    ("cfd.py", "cfd", ["fid", "fid_unseen"], 0.8),  # by features; also in those it has not seen
])
def test_a_short_training_beats_ddim(tmp_path, script, name, spaces, factor):
    """Digits, 8 -> 4 in 100 updates: a lower FID than the teacher's with 4 DDIM steps."""
    options = "--from-steps 8 --to-steps 4 --updates 100 --nfe 4 --eval-n 512".split()
    subprocess.run(
        [sys.executable, script, "--device", "cpu", *options, "--out", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )
    for space in spaces:
        fid = {row["name"]: row[space] for row in results(tmp_path)}
        assert fid[name] < factor * min(fid["ddim"], fid["ddim-edm"]), fid
