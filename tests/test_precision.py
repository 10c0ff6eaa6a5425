"""--precision: what is measured on a CPU, and that a continued run repeats what was chosen."""

import types

import pytest
import torch
from scripts import differences, watch
from test_run import run_in_parts
from test_teacher import train
from torch import nn

from common import precision, teacher
from common.machinery import run as run_module
from common.machinery.files import load_checkpoint
from common.machinery.run import Run


def asked(choice="auto", smoke=False):
    return types.SimpleNamespace(precision=choice, smoke=smoke)


class Clock:
    """A clock that a pass moves on: by 1 s in float32, by `bf16` s under autocast."""

    def __init__(self, monkeypatch, bf16, first=0):
        self.now, self.bf16, self.first, self.calls = 0.0, bf16, first, 0
        clock = types.SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(precision, "time", clock)
        monkeypatch.setattr(precision, "has_bf16", lambda device: True)

    def passes(self):
        torch.rand(1)
        self.calls += 1
        under = torch.is_autocast_enabled("cpu")
        self.now += self.bf16 if under else 1.0
        if self.calls <= 2:  # the first of each is another: it must not count
            self.now -= self.first * (self.bf16 if under else 1.0)


@pytest.mark.parametrize("first", [0, 0.9])
@pytest.mark.parametrize("seconds, faster", [(0.5, True), (0.89, True), (0.95, False), (2, False)])
def test_auto_takes_bf16_where_it_is_a_tenth_faster(monkeypatch, seconds, faster, first):
    clock = Clock(monkeypatch, seconds, first)
    state = torch.get_rng_state()
    chosen, why = precision.chosen_precision(asked(), "cpu", clock.passes)
    assert chosen == faster and why.startswith("bf16 (" if faster else "fp32 (")
    assert f"1 s in fp32, {seconds:.3g} s in bf16" in why
    assert torch.equal(torch.get_rng_state(), state) and clock.calls == 8


@pytest.mark.parametrize("choice, has_it, smoke, chosen", [
    ("auto", False, False, False), ("auto", True, True, False),
    ("bf16", False, False, True), ("fp32", True, False, False),
])
def test_nothing_is_measured_where_the_answer_is_known(monkeypatch, choice, has_it, smoke, chosen):
    monkeypatch.setattr(precision, "has_bf16", lambda device: has_it)
    assert precision.chosen_precision(asked(choice, smoke), "cpu", None)[0] == chosen


@pytest.mark.parametrize("has_it", [True, False])
def test_a_gpu_takes_bf16_if_it_has_it(monkeypatch, has_it):
    monkeypatch.setattr(precision, "has_bf16", lambda device: device == "cuda" and has_it)
    assert precision.chosen_precision(asked(smoke=True), "cuda", None)[0] == has_it


@pytest.mark.parametrize("bf16", [True, False])
def test_a_continued_run_repeats_the_choice_bitwise(tmp_path, monkeypatch, bf16):
    """Also where a measurement would now say something else."""
    choose = lambda answer: monkeypatch.setattr(
        run_module, "chosen_precision", lambda *about: (answer, "")
    )
    choose(bf16)
    train(tmp_path / "whole", steps=6)
    monkeypatch.setattr(teacher, "Run", lambda *a: Run(*a, checkpoint_seconds=0))
    with monkeypatch.context() as patch:
        watch(patch, teacher, "edm_loss", fails_at=4)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "cut", steps=6)
    choose(not bf16)
    train(tmp_path / "cut", steps=6, resume=True)
    train(tmp_path / "other", steps=6)
    paths = (tmp_path / name / "checkpoint.pt" for name in ("whole", "cut", "other"))
    whole, cut, other = (load_checkpoint(path)["parts"] for path in paths)
    assert not differences(whole, cut) and differences(whole, other)


def test_a_measurement_changes_nothing(tmp_path, monkeypatch):
    """Not the random numbers of dropout, nor the gradients."""
    train(tmp_path / "asked", steps=2, dropout=0.5, precision="fp32")
    ticks = iter(range(100))  # to the power of 2: each call takes longer than the one before
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks) ** 2)
    monkeypatch.setattr(precision, "time", clock)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    train(tmp_path / "measured", steps=2, dropout=0.5)
    paths = (tmp_path / name / "checkpoint.pt" for name in ("asked", "measured"))
    asked, measured = (load_checkpoint(path)["parts"] for path in paths)
    assert next(ticks) == 16 and not differences(asked, measured)


def test_the_pass_that_is_measured_is_a_part_of_the_batch_and_leaves_no_gradient(
    tmp_path, monkeypatch
):
    sizes = []

    def measured(config, device, passes):
        passes()
        sizes.extend(seen)
        return False, ""

    monkeypatch.setattr(run_module, "chosen_precision", measured)
    net, seen = nn.Linear(1, 1, bias=False), []
    run, optimizer = run_in_parts(tmp_path, 2), torch.optim.SGD(net.parameters(), lr=1)

    def loss_fn(x):
        seen.append(len(x))
        return net(x).mean()

    run.backward(optimizer, loss_fn, torch.ones(4, 1))
    run.backward(optimizer, loss_fn, torch.ones(4, 1))
    assert sizes == [2] and seen == 5 * [2] and net.weight.grad.item() == pytest.approx(1)
