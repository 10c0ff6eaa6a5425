"""common/machinery/run.py: a run that is started wrongly, stopped, killed, resumed, in parts."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_options import Config, one_line, parse
from torch import nn

from common import UsageError
from common.machinery import plots
from common.machinery import run as machinery
from common.machinery.files import load_checkpoint, save_checkpoint
from common.machinery.options import TrainingOptions
from common.machinery.run import METRICS, Run, State, commit, pick_device, table

ROOT = Path(__file__).parent.parent


def make(out, **options):
    return Run("method", Config(out=str(out), **options), checkpoint_seconds=1e9)


def logged(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def test_devices():
    device, line = pick_device("cpu")
    assert device == torch.device("cpu") and "as asked" in line and "float" not in line
    device, line = pick_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert ("no CUDA" in line) == (device.type == "cpu")
    wrong = ["gpu", "cuda:99"] + ([] if torch.cuda.is_available() else ["cuda"])
    for name in wrong:
        pattern = f"--device {name}: not available here .*; try --device cpu"
        with pytest.raises(UsageError, match=pattern) as error:
            pick_device(name)
        one_line(error)


# ------------------------------------------------------------------- folder, log, metrics


def test_a_run_leaves_its_metrics_and_its_log(tmp_path, capsys, monkeypatch):
    run = make(tmp_path / "run", seed=3)
    assert "method on digits: device cpu" in capsys.readouterr().out
    run.log(step=1, loss=0.5)
    run.log(step=2, loss=0.25, other=7)
    assert run.logged("loss") == ([1, 2], [0.5, 0.25]) and run.logged("other") == ([2], [7])
    rows = [{"name": "ours", "nfe": 1, "fid": 1.0, "fid_features": "classifier", "fid_n": 10}]
    run.start -= 10
    (run.out / "samples.png").touch()
    (run.out / "student").mkdir()
    monkeypatch.setattr("sys.argv", ["/some/where/ld3.py", "--nfe", "5"])
    run.finish(rows, extra=1)
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert list(metrics) == [
        *("method", "dataset", "teacher", "seed", "command", "commit", "device", "bf16"),
        *("versions", "config"),
        *("seconds", "peak_memory_mb", "results", "extra"),
    ]
    assert (metrics["method"], metrics["dataset"], metrics["seed"]) == ("method", "digits", 3)
    assert metrics["teacher"] == "none" and metrics["results"] == rows and metrics["extra"] == 1
    assert metrics["command"] == "ld3.py --nfe 5" and metrics["commit"] == commit()
    assert metrics["config"]["seed"] == 3 and metrics["config"]["widths"] == [16, 32]
    assert metrics["versions"]["torch"] == torch.__version__
    assert 10 <= metrics["seconds"] < 70 and 10 < metrics["peak_memory_mb"] < 1e6
    printed = capsys.readouterr().out
    assert "fid [classifier, n=10]" in printed  # the table, and where things lie
    assert "mean nothing" not in printed
    assert f"in {run.out}: log.jsonl, metrics.json, samples.png, student/\n" in printed
    assert [(x["step"], x["loss"]) for x in logged(run.out)] == [(1, 0.5), (2, 0.25)]
    assert all(x["seconds"] >= 0 for x in logged(run.out))

    again = make(tmp_path / "run")
    assert len(logged(run.out)) == 2  # it may yet fail on a bad option: nothing is lost
    again.log(step=7)
    again.log(step=8)
    assert [x["step"] for x in logged(run.out)] == [7, 8]  # its own log


def test_metrics_name_the_teacher(tmp_path):
    for given, recorded in ((None, "digits (shipped or cached)"), ("my.pt", "my.pt")):
        run = make(tmp_path)
        run.config.teacher = given
        run.finish([{"name": "ours", "nfe": 1}])
        assert json.loads((tmp_path / "metrics.json").read_text())["teacher"] == recorded


def test_ranks_above_0_write_nothing(tmp_path, capsys):
    run = make(tmp_path)
    capsys.readouterr()
    run.rank = 1
    run.say("a line")
    run.log(step=1, loss=0.5)
    run.finish([{"name": "ours", "nfe": 1}])
    for _ in run.steps(1):
        run.loss = torch.zeros(())
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl"}
    assert not logged(tmp_path) and capsys.readouterr() == ("", "")


def test_the_default_folder_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run("ld3", Config(dataset="mnist")).out == Path("runs/ld3-mnist")
    assert (tmp_path / "runs/ld3-mnist/log.jsonl").exists()
    for place, name in (("my/cats", "cats"), ("cats.zip", "cats"), ("mnist", "folder-mnist")):
        run = Run("ld3", Config(dataset="folder", data_dir=place))
        assert run.out == Path(f"runs/ld3-{name}")  # and no run on MNIST lies there


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    pattern = "--out .*/file/run: cannot be written .*; choose another folder"
    with pytest.raises(UsageError, match=pattern) as error:
        make(tmp_path / "file" / "run")
    one_line(error)


def test_only_what_a_run_left_half_written_is_swept(tmp_path):
    left = ["checkpoint.pt.12.part", "metrics.json.3.part", "samples.npz.456.part"]
    users = ["movie.mkv.part", "photos.part/a.jpg", "student.part", "a.2024.part"]
    for name in (*left, *users):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    make(tmp_path)
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in users)


def test_draws_are_those_of_the_global_generators(tmp_path):
    run = make(tmp_path, seed=5)
    drawn = [run.randn(4, 3, 2), run.rand(5), run.randint(7, 100)]
    torch.manual_seed(5)
    expected = [torch.randn(4, 3, 2), torch.rand(5), torch.randint(7, (100,))]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_draw_the_rows_of_one_batch(tmp_path, monkeypatch, world):
    def draws():
        run = make(tmp_path, seed=5)
        return [run.randn(7, 3, 2), run.rand(7), run.randint(9, 7), run.randn(2)]

    whole, parts = draws(), []
    for rank in range(world):
        monkeypatch.setattr("common.machinery.ranks.rank_and_world", lambda r=rank: (r, world))
        parts.append(draws())
    for i, rows in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), rows)


# ----------------------------------------------------------------------------- the table


def test_a_table_has_the_columns_that_some_row_has():
    rows = [{"name": "a", "fid": None, "recall": None}, {"name": "b", "fid": 0.0}]
    lines = [line.split() for line in table(rows, ["name", "nfe", *METRICS]).splitlines()]
    assert lines == [["name", "fid"], ["a", "not", "run"], ["b", "0"]]


def test_a_table_shows_what_was_not_run_and_on_what_a_fid_rests():
    found = {"fid": 12.345678, "fid_features": "digits classifier", "fid_n": 1797}
    rows = [
        {"name": "euler", "nfe": 5, "fid": None, "rmse": 0.123456},
        {"name": "ld3", "nfe": 5, **found},
        {"name": "teacher", "nfe": 20, "fid": 1.5},
    ]
    above, *lines = table(rows, ["name", "nfe", "fid", "rmse"]).splitlines()
    assert above == "fid [digits classifier, n=1797]"
    assert re.split(r"  +", lines[0].strip()) == ["name", "nfe", "fid", "rmse"]
    assert [re.split(r"  +", line.strip()) for line in lines[1:]] == [
        ["euler", "5", "not run", "0.1235"],
        ["ld3", "5", "12.35", "not run"],
        ["teacher", "20", "1.5", "not run"],
    ]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_the_commit_is_that_of_the_code_or_none(monkeypatch):
    def describe(command, **_):
        assert command[:3] == ["git", "-C", str(Path(machinery.__file__).parent)]
        return SimpleNamespace(stdout="1a2b3c4-dirty\n")

    monkeypatch.setattr(machinery.subprocess, "run", describe)
    assert commit() == "1a2b3c4-dirty"

    def no_git(command, **_):
        raise FileNotFoundError

    monkeypatch.setattr(machinery.subprocess, "run", no_git)
    assert commit() is None


def test_a_table_says_what_real_images_and_noise_have(tmp_path, capsys):
    unseen = "digits-classifier-seed1-0a1b2c"
    row = {"fid": 1.25, "fid_features": "digits-classifier", "fid_n": 64, "recall": 0.5}
    row |= {"fid_unseen": 2.5, "fid_unseen_features": unseen, "precision_recall_features": unseen}
    row |= {"rmse_to_teacher": 0.123456, "precision": 0.123456}
    row |= {"rmse_se": 0.00234, "kid": 0.0123456, "kid_se": 0.000456}
    del row["recall"]  # with it 104 columns, but no script measures all of that
    run = make(tmp_path)
    run.config.smoke = True
    run.references = {
        "fid": {"noise": 98.76543, "real": 0.5, "real_n": 297}, "fid_unseen": {"noise": 70.0},
        "kid": {"noise": 5.6, "real": 0.02, "real_n": 297},
    }
    capsys.readouterr()
    run.finish([{"name": "rectified-flow-equal-compute", "nfe": 16, **row}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "fid, kid [digits-classifier, n=64]: real test images have 0.5, 0.02 (n=297), "
        "noise 98.77, 5.6",
        f"fid_unseen, precision [{unseen}, n=64]: noise 70",
    ]
    assert lines[2].split()[:5] == ["name", "nfe", "rmse_to_teacher", "fid", "kid"]
    assert lines[3].split()[2:5] == ["0.1235±0.002", "1.25", "0.0123±0.0005"]
    assert "--smoke tries the path only: these numbers mean nothing" in lines
    assert all(len(line) <= 100 for line in lines[:-1])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["references"] == run.references  # and not among the results
    assert [row["name"] for row in metrics["results"]] == ["rectified-flow-equal-compute"]


@pytest.mark.parametrize("names, explained", [
    (("ddim", "d-ddim", "d-heun", "ab2"), ["d-", "ab2"]), (("ddim-edm", "teacher"), ["ddim-edm",
     "teacher"]), (("cud", "pd"), []),
])  # fmt: skip
def test_names_are_explained_where_they_occur(names, explained, tmp_path, capsys):
    run = make(tmp_path)
    capsys.readouterr()
    run.finish([{"name": name, "nfe": 5, "fid": 1.0} for name in names])
    _, *lines = capsys.readouterr().out.splitlines()[len(names) : -1]
    assert [line.split(":")[0] for line in lines] == explained  # each once
    run.finish([{"name": "a", "nfe": 1, "fid_unseen": 1.0}])
    assert "\nfid_unseen: FID in the features" in capsys.readouterr().out


# ------------------------------------------------------------------------ stop and resume


def test_a_new_run_does_not_replace_one_that_was_stopped_half_way(tmp_path):
    assert train(tmp_path, interrupt=3)[0] == 130
    before = (tmp_path / "checkpoint.pt").read_bytes()
    pattern = r"--out .*: a run of method was stopped here after step 4; go on with --resume"
    for options in ({}, {"smoke": True}):
        with pytest.raises(UsageError, match=pattern) as error:
            train(tmp_path, **options)
        one_line(error)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert train(tmp_path, resume=True)[0] == 0
    assert train(tmp_path, interrupt=3, smoke=True)[0] == 130  # a finished one may be replaced
    (tmp_path / "metrics.json").touch()
    assert train(tmp_path)[0] == 0  # and one of --smoke
    assert not (tmp_path / "metrics.json").exists()  # that of the run before
    (tmp_path / "checkpoint.pt").write_bytes(b"not ours")
    assert train(tmp_path)[0] == 0


def test_a_new_run_does_not_replace_a_finished_one_of_other_options(tmp_path):
    train(tmp_path)
    (tmp_path / "metrics.json").touch()
    for options in ({"seed": 1}, {"smoke": True}):
        pattern = "--out .*: the finished run of method there has other options; give another --out"
        with pytest.raises(UsageError, match=pattern) as error:
            train(tmp_path, **options)
        one_line(error)
    assert (tmp_path / "metrics.json").exists() and train(tmp_path)[0] == 0  # of its own: again


def train(
    out, interrupt=None, number=signal.SIGINT, counts=(9,), resume=False, poison=None,
    checkpoint_seconds=1e9, poisoned=None, **options,
):
    """Fit a line with Adam, noise from the global generator and an EMA; `counts` steps per phase.

    Global step `interrupt` raises signal `number` in its middle; the loss of step `poison` is NaN.
    Returns the exit code, the (phase, step) done, the losses, and the weights at the end.
    """
    run = Run("method", Config(out=str(out), resume=resume, **options), checkpoint_seconds)
    net = nn.Linear(2, 1)
    ema = nn.Linear(2, 1).requires_grad_(False)
    ema.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    done, trace = [], []
    train.done = done
    run.resume(net=net, ema=ema, optimizer=optimizer)
    code = 0
    try:
        for phase, count in enumerate(counts):
            for step in run.steps(count, ("training", "second", "third")[phase]):
                x = torch.randn(8, 2)
                loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                at = step + sum(counts[:phase])
                if at == interrupt:
                    # or pytest itself would die
                    assert signal.getsignal(number) is not signal.SIG_DFL
                    os.kill(os.getpid(), number)
                optimizer.step()
                for average, parameter in zip(ema.parameters(), net.parameters()):
                    average.lerp_(parameter.detach(), 0.1)
                shown = loss.detach() * (math.nan if at == poison else 1)
                run.loss = {"fine": loss, poisoned: shown} if poisoned else shown
                trace.append(loss.item())
                done.append((phase, step) if len(counts) > 1 else step)
    except SystemExit as stop:
        code = stop.code
    averages = {f"ema.{k}": v for k, v in ema.state_dict().items()}
    return code, done, trace, {**net.state_dict(), **averages}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, number, capsys):
    """A signal in the middle of step 3: the step ends, its state is saved, exit code 130.

    --resume goes on at step 4, bit for bit.
    """
    before = signal.getsignal(number)
    code, done, trace, state = train(tmp_path / "whole")
    assert code == 0 and done == list(range(9)) and trace[-1] != trace[0]
    code, done, first_half, _ = train(tmp_path / "halves", interrupt=3, number=number)
    assert code == 130 and done == [0, 1, 2, 3] and signal.getsignal(number) == before
    assert "stopped after step 4 of 9; the same command with --resume" in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "halves" / "checkpoint.pt")
    assert saved["fewstep"] == "method" and saved["step"] == 4 and saved["seconds"] > 0
    torch.randn(100)  # whatever happens in between
    code, done, second_half, resumed = train(tmp_path / "halves", resume=True)
    assert code == 0 and done == [4, 5, 6, 7, 8] and first_half + second_half == trace
    assert all(torch.equal(resumed[k], state[k]) for k in state)
    assert train(tmp_path / "halves", resume=True)[1] == []  # a finished run has nothing left to do
    assert signal.getsignal(number) == before
    steps = [line["step"] for line in logged(tmp_path / "halves")]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 8  # the log goes on, too


@pytest.mark.parametrize(
    "second,stops", [(signal.SIGINT, "at once"), (signal.SIGTERM, "after the step")]
)
def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, second, stops, capsys):
    """torchrun sends SIGTERM after a Ctrl-C: it must not spoil the saving."""
    run = make(tmp_path)
    run.resume()
    before, reached = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt if stops == "at once" else SystemExit):
        for _ in run.steps(3):
            run.loss = torch.zeros(())
            os.kill(os.getpid(), signal.SIGINT)
            assert "stopping after this step" in capsys.readouterr().out
            os.kill(os.getpid(), second)
            reached = True
    assert reached == (stops == "after the step") == (tmp_path / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) == before


PHASES = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


@pytest.mark.parametrize("interrupt", range(8))
def test_a_run_of_several_phases_resumes_in_each(tmp_path, interrupt, capsys):
    """Phases that were finished yield nothing; the one that was stopped goes on where it was."""
    counts = (4, 3, 2)
    code, done, trace, state = train(tmp_path / "whole", counts=counts)
    assert code == 0 and done == PHASES
    capsys.readouterr()
    out = tmp_path / "cut"
    code, done, first_half, _ = train(out, counts=counts, interrupt=interrupt)
    assert code == 130 and done == PHASES[: interrupt + 1]
    phase, step = PHASES[interrupt]
    assert f"stopped after step {step + 1} of {counts[phase]}" in capsys.readouterr().out
    assert load_checkpoint(out / "checkpoint.pt")["step"] == interrupt + 1
    code, done, second_half, resumed = train(out, counts=counts, resume=True)
    assert code == 0 and done == PHASES[interrupt + 1 :] and first_half + second_half == trace
    assert all(torch.equal(resumed[k], state[k]) for k in state)
    lines = [(line["what"], line["step"]) for line in logged(out)]
    assert lines[0] == ("training", 0) and lines[-1] == ("third", 8)  # steps of the whole run
    assert [step for _, step in lines] == sorted({step for _, step in lines})
    assert train(out, counts=counts, resume=True)[1] == []


def test_the_end_of_a_phase_is_saved(tmp_path):
    run = make(tmp_path)
    run.resume()
    for count, total in ((3, 3), (0, 3), (2, 5)):
        assert list(run.steps(count)) == list(range(count))
        assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == total


def test_seconds_add_up_over_a_resume(tmp_path):
    train(tmp_path, interrupt=2)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", "method", {**state, "seconds": 1000.0})
    assert 1000 < make(tmp_path, resume=True).seconds() < 1100


def test_checkpoints_fall_due(tmp_path):
    """With no seconds between checkpoints every step is saved: a crash loses one step alone."""
    run = Run("method", Config(out=str(tmp_path)), checkpoint_seconds=0)
    net, seen = nn.Linear(1, 1), []
    run.resume(net=net)
    for step in run.steps(6):
        if step:
            saved = load_checkpoint(tmp_path / "checkpoint.pt")
            seen.append(saved["step"])
            assert saved["parts"]["net"]["bias"].item() == step - 1
        nn.init.constant_(net.bias, step)
    assert seen == [1, 2, 3, 4, 5] and load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    """Also where the loss is not due to be shown: a poisoned state never replaces a good one."""
    pattern = "training: the loss, or its gradient, is nan at step 4; the last checkpoint is kept"
    with pytest.raises(UsageError, match=pattern) as error:
        train(tmp_path, poison=4, checkpoint_seconds=0)
    one_line(error)
    assert train.done == [0, 1, 2, 3, 4]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    for name, poison, more in (("first", 0, {}), ("last", 8, {}), ("stopped", 5, {"interrupt": 5})):
        with pytest.raises(UsageError, match=f"the loss, .* is nan at step {poison}"):
            train(tmp_path / name, poison=poison, **more)
        assert not (tmp_path / name / "checkpoint.pt").exists()


def test_any_of_several_losses_stops_the_run(tmp_path):
    with pytest.raises(UsageError, match="training: the critic, .* is nan at step 4"):
        train(tmp_path, poison=4, poisoned="critic", checkpoint_seconds=0)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(line["fine"] == line["critic"] for line in lines[:4])


def test_a_gradient_that_is_not_finite_never_overwrites_a_good_checkpoint(tmp_path):
    """The loss sqrt(w) is 0 at w = 0, its gradient is not finite, and after a step w is NaN."""
    run = run_in_parts(tmp_path)
    run.checkpoint_seconds = 0
    net = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    run.resume(net=net)
    nn.init.constant_(net.weight, 4.0)
    with pytest.raises(UsageError, match="or its gradient, is nan at step 3"):
        for step in run.steps(9):
            if step == 3:
                nn.init.zeros_(net.weight)
            run.loss = run.backward(optimizer, lambda x: net(x).sqrt().mean(), torch.ones(2, 1))
            optimizer.step()
    assert net.weight.isnan().all()
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["step"] == 3 and saved["parts"]["net"]["weight"].item() == 4


def test_resume_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(UsageError, match="checkpoint.pt: no such checkpoint"):
        train(tmp_path / "empty", resume=True)
    train(tmp_path, interrupt=2, seed=1, widths=(8, 16))
    for options, pattern in [
        ({"seed": 2}, "--seed 2: the checkpoint to resume has 1"),
        ({"seed": 1, "lr": 0.1}, "--lr 0.1: the checkpoint to resume has None"),
        ({"seed": 1, "widths": (8,)}, r"--widths \(8,\): the checkpoint to resume has \(8, 16\)"),
    ]:
        with pytest.raises(UsageError, match=pattern) as error:
            train(tmp_path, resume=True, **{"widths": (8, 16), **options})
        one_line(error)
    options = dict(resume=True, seed=1, widths=(8, 16))
    elsewhere = dict(data_dir="/elsewhere", device=str(torch.device("cpu", 0)))
    assert train(tmp_path, counts=(5,), **options, **elsewhere)[1] == [3, 4]  # only how and where
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", "method", {**state, "fewstep": "other"})
    with pytest.raises(UsageError, match="--resume: .* belongs to other, not method"):
        train(tmp_path, **options)
    for name in ("config", "parts", "rng", "seconds", "step"):
        save_checkpoint(tmp_path / "checkpoint.pt", "method", {**state, name: "text"})
        with pytest.raises(UsageError, match=f"checkpoint.pt has no usable '{name}'$"):
            train(tmp_path, **options)
    save_checkpoint(tmp_path / "checkpoint.pt", "method", {**state, "parts": {}})
    with pytest.raises(UsageError, match="the net in .*checkpoint.pt does not fit"):
        train(tmp_path, **options)


def test_a_restored_run_does_not_keep_the_checkpoint_in_memory(tmp_path):
    train(tmp_path, interrupt=2)
    run = make(tmp_path, resume=True)
    assert "parts" in run.restored
    run.resume()
    assert run.done == 3 and "parts" not in run.restored


def test_an_expensive_checkpoint_is_made_seldom(tmp_path, monkeypatch):
    """At most a twentieth of the time goes into them."""
    clock, saves = [0.0], []
    monkeypatch.setattr(machinery.time, "perf_counter", lambda: clock[0])
    run = Run("method", Config(out=str(tmp_path)), checkpoint_seconds=10)

    def save():
        saves.append(run.done)
        clock[0] += 5

    monkeypatch.setattr(run, "_save", save)
    for _ in run.steps(400):
        clock[0] += 1
    assert saves[:3] == [11, 112, 213] and saves[-1] == 400


def test_a_run_may_go_on_in_other_parts_and_be_measured_otherwise(tmp_path):
    def options(**changed):
        given = {"out": str(tmp_path), "device": "cpu", "eval_n": 10, "eval_batch": 5}
        return TrainingOptions(**{**given, **changed})

    for _ in Run("method", options()).steps(3):
        pass
    measured = dict(eval_n=20, eval_batch=7, recall=True, reference="train", inception="x")
    parts = dict(batch_per_gpu=2, checkpoint=True, compile=True)
    assert Run("method", options(resume=True, **measured, **parts)).restored["step"] == 3
    with pytest.raises(UsageError, match="--dataset mnist: the checkpoint to resume has digits"):
        Run("method", options(resume=True, dataset="mnist"))


def test_options_from_the_command_line_resume_like_defaults(tmp_path):
    """`--widths 16 32` is the default, spelt out."""
    train(tmp_path, interrupt=1)
    spelt = parse("--widths", "16", "32", "--out", str(tmp_path), "--resume", "--device", "cpu")
    assert Run("method", spelt).restored["step"] == 2


def test_a_state_holds_numbers_tensors_and_dicts(tmp_path):
    run = Run("method", Config(out=str(tmp_path)), checkpoint_seconds=0)
    state = State(best=torch.zeros(2), history=[], stage=0, learned={})
    run.resume(state=state)
    for step in run.steps(2):
        state.best = torch.full((2,), float(step))
        state.history.append(step)
        state.learned = {"a": torch.ones(1)}
        state.stage += 1
    run = make(tmp_path, resume=True)
    again = State(best=torch.zeros(2), history=[], stage=0, learned={})
    run.resume(state=again)
    assert torch.equal(again.best, torch.ones(2)) and again.history == [0, 1]
    assert again.stage == 2 and torch.equal(again.learned["a"], torch.ones(1))


# --------------------------------------------------------- folders, machines, what was cut short


OTHER = """
import sys, time
from common.machinery.run import Run
sys.path.insert(0, "tests")
from test_options import Config
run = Run("method", Config(out=sys.argv[1]))
print("there", flush=True)
time.sleep(100)
"""


def test_two_processes_do_not_run_in_one_folder(tmp_path):
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        try:
            for line in process.stdout:
                if b"there" in line:
                    break
            for resume in (False, True):
                with pytest.raises(UsageError, match=f"--out {tmp_path}: another process") as error:
                    make(tmp_path, resume=resume)
                one_line(error)
        finally:
            process.kill()
    make(tmp_path)
    make(tmp_path)  # one process may begin again


def test_a_program_is_unfinished_until_its_metrics_are_written(tmp_path, monkeypatch):
    """Ctrl-C while results are sampled, then the same command: nothing is trained anew."""
    monkeypatch.setattr(machinery.cli, "running", True)
    assert train(tmp_path)[0] == 0
    with pytest.raises(UsageError, match="was stopped here after step 9; go on with --resume"):
        make(tmp_path)
    run = make(tmp_path, resume=True)
    run.resume()
    assert not list(run.steps(9))
    run.finish([{"name": "ours", "nfe": 1}])
    make(tmp_path)
    tried = tmp_path / "tried"  # a smoke test is never in the way
    assert train(tried, smoke=True)[0] == 0
    make(tried)


def test_a_run_with_other_options_gets_a_default_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(**options):
        run = Run("method", Config(device="cpu", **options))
        run.resume()
        list(run.steps(1))
        return str(run.out)

    first, second, third = (f"runs/method-digits{number}" for number in ("", "-2", "-3"))
    assert run(smoke=True) == first  # is replaced: it was a try
    assert [run(seed=seed) for seed in (1, 2, 1, 3, 2)] == [first, second, first, third, second]
    assert run(seed=2, resume=True) == second
    with pytest.raises(UsageError, match="--seed 9: the checkpoint to resume has 1"):
        run(seed=9, resume=True)


def test_a_log_that_was_cut_short_is_read_and_continued(tmp_path):
    run = make(tmp_path)
    for step in range(3):
        run.log(step=step, loss=0.5)
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert run.logged("loss") == ([0, 1], [0.5, 0.5])
    run = make(tmp_path)
    run.log_mode = "a"
    run.log(step=3, loss=0.25)
    assert run.logged("loss") == ([0, 1, 3], [0.5, 0.5, 0.25])


def test_a_checkpoint_cut_short_or_of_other_networks_is_one_line(tmp_path):
    train(tmp_path, interrupt=2)
    run = make(tmp_path, resume=True)
    with pytest.raises(UsageError, match="the net in .*checkpoint.pt does not fit") as error:
        run.resume(net=nn.Linear(7, 7))
    one_line(error)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match="checkpoint.pt: .* cut short .* delete it") as error:
            make(tmp_path, resume=True)
        one_line(error)


def test_a_run_in_a_thread_gets_no_signals_and_works(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path)[0]))
    thread.start()
    thread.join()
    assert found == [0]


def test_without_a_compiler_compile_is_one_line(monkeypatch):
    def broken(function):
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match="^--compile: not possible .*Failed to find") as error:
        machinery.check_compiler("cpu")
    one_line(error)


def test_the_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/ld3.py", "--data-dir", "my images", "--nfe", "5"])
    assert machinery.command_line() == "ld3.py --data-dir 'my images' --nfe 5"
    spec = SimpleNamespace(name="common.teacher", origin="/x/common/teacher.py")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr("sys.argv", ["/x/common/teacher.py", "--smoke"])
    assert machinery.command_line() == "-m common.teacher --smoke"


def test_a_picture_that_fails_costs_no_numbers(tmp_path, capsys, monkeypatch):
    images = {"teacher": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}
    monkeypatch.setattr(plots.Figure, "savefig", lambda *_, **__: 1 / 0)
    plots.save_rows(tmp_path / "samples.png", images)
    assert "samples.png could not be drawn" in capsys.readouterr().out
    assert (tmp_path / "samples.npz").exists()


@pytest.mark.slow
def test_odd_machines(tmp_path):
    """No docstrings, no home, settings of other programs; the reader of the output leaves."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 99\n")
    environment = {
        "PATH": os.environ["PATH"], "FEWSTEP_CACHE": str(tmp_path / "cache"), "WORLD_SIZE": "2",
        "MPLBACKEND": "of_a_notebook", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "OMP_NUM_THREADS": "1",
    }
    command = f"{sys.executable} -OO dode.py --smoke --device cpu --out {tmp_path}/run | head -1"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    names = {"metrics.json", "samples.png", "samples.npz"}
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}, done.stderr
    for flag in ("--help", "--help-all"):
        done = subprocess.run(
            [sys.executable, "-OO", "ld3.py", flag], cwd=ROOT, env=environment, capture_output=True
        )
        assert done.returncode == 0 and b"--dataset" in done.stdout


# ----------------------------------------------------------------------------- gradients


def run_in_parts(tmp_path, at_most=None, precision="fp32"):
    """A Run with --batch-per-gpu `at_most`."""
    config = Config(out=str(tmp_path))
    config.batch_per_gpu, config.precision = at_most, precision
    return Run("method", config)


@pytest.mark.parametrize("at_most", [None, 1, 3, 4, 7, 100])
def test_parts_of_a_batch_add_up_to_its_gradient(tmp_path, at_most):
    torch.manual_seed(0)
    net, seen = nn.Linear(3, 1).double(), []
    x, y = torch.randn(7, 3).double(), torch.randn(7, 1).double()

    def loss_fn(x, y, nothing):
        assert nothing is None
        seen.append(len(x))
        return (net(x) - y).square().mean()

    expected = (net(x) - y).square().mean()
    gradients = torch.autograd.grad(expected, list(net.parameters()))
    run, optimizer = run_in_parts(tmp_path, at_most), torch.optim.SGD(net.parameters(), lr=1)
    for _ in range(2):  # new gradients each time: nothing is left of the old ones
        seen.clear()
        total = run.backward(optimizer, loss_fn, x, y, None)
        assert not total.requires_grad and total.item() == pytest.approx(expected.item())
        assert max(seen) == min(at_most or 7, 7) and sum(seen) == 7
        for parameter, gradient in zip(net.parameters(), gradients):
            torch.testing.assert_close(parameter.grad, gradient)
    kept = net.weight.grad.clone().mul_(3)
    net.weight.grad.copy_(kept)
    net.bias.grad.zero_()
    run.backward(torch.optim.SGD([net.bias], lr=1), loss_fn, x, y, None)
    torch.testing.assert_close(net.bias.grad, gradients[1])
    assert torch.equal(net.weight.grad, kept)  # not one of this optimizer's parameters


def test_whole_batches_are_not_rescaled(tmp_path):
    """Bitwise what loss.backward() gives."""
    x, rows = torch.randn(7, requires_grad=True), torch.ones(7)
    optimizer = torch.optim.SGD([x], lr=1)
    run = run_in_parts(tmp_path)
    loss = run.backward(optimizer, lambda rows: (rows * x).square().mean() / 3, rows)
    found, x.grad = x.grad, None
    expected = (rows * x).square().mean() / 3
    expected.backward()
    assert torch.equal(found, x.grad) and torch.equal(loss, expected.detach())


@pytest.mark.parametrize("at_most", [None, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_makes_the_loss_nan(tmp_path, value, at_most):
    """One number of one parameter, in any part of the batch, is enough; the loss is finite."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([a, b], lr=1)
    run = run_in_parts(tmp_path, at_most)

    def loss_fn(rows):
        return (rows.mean() * (a.sum() + b.sum())) / 3

    rows = torch.ones(2)
    assert run.backward(optimizer, loss_fn, rows).item() == pytest.approx(7 / 3)
    weak = torch.zeros(2, 2)
    weak[1, 0] = value
    hook = b.register_hook(lambda gradient: gradient + weak)
    assert run.backward(optimizer, loss_fn, rows).isnan()
    hook.remove()
    assert run.backward(optimizer, loss_fn, rows).item() == pytest.approx(7 / 3)


def test_autocast_is_asked_for_unless_a_loss_needs_float32(tmp_path):
    net, seen = nn.Linear(2, 1), []
    run = run_in_parts(tmp_path, precision="bf16")
    optimizer = torch.optim.SGD(net.parameters(), lr=1)

    def loss_fn(x):
        seen.append(net(x).dtype)
        return net(x).float().mean()

    run.backward(optimizer, loss_fn, torch.ones(3, 2))
    run.backward(optimizer, loss_fn, torch.ones(3, 2), mixed_precision=False)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("at_most", [None, 2])
def test_ranks_mask_differently_and_step_by_step_anew(tmp_path, monkeypatch, at_most):
    """Of dropout. The generators that ranks share do not move; one rank alone draws from them."""
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1)

    def masks(rank, world, steps=3):
        monkeypatch.setattr("common.machinery.ranks.rank_and_world", lambda: (rank, world))
        monkeypatch.setattr("common.machinery.run.average_gradients", lambda parameters: None)
        run, drawn = run_in_parts(tmp_path, at_most), []

        def loss_fn(x):
            drawn.append(nn.functional.dropout(torch.ones(40), 0.5))
            return net(x).mean()

        torch.manual_seed(1)
        for _ in run.steps(steps):
            run.backward(optimizer, loss_fn, torch.ones(4, 1))
            run.backward(optimizer, loss_fn, torch.ones(4, 1))  # another network's, perhaps
        return drawn, torch.rand(3)

    drawn, after = zip(*(masks(rank, 2) for rank in range(2)))
    different = {tuple(mask.tolist()) for masks_of_one in drawn for mask in masks_of_one}
    assert len(different) == sum(map(len, drawn)) == (24 if at_most else 12)
    torch.manual_seed(1)
    assert torch.equal(*after) and torch.equal(after[0], torch.rand(3))
    torch.manual_seed(1)
    expected = [nn.functional.dropout(torch.ones(40), 0.5) for _ in range(6)]
    if at_most is None:
        assert all(torch.equal(a, b) for a, b in zip(masks(0, 1)[0], expected))


# --------------------------------------------------------------------- large networks


def test_checkpoint_recomputes_the_same_gradients_and_compile_keeps_the_names(monkeypatch):
    from common.unet import Block, ddpmpp

    torch.manual_seed(0)
    kwargs = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    net = ddpmpp(8, 1, dropout=0.2, **kwargs)
    wrapped, x, calls, names = nn.Module(), torch.randn(2, 1, 8, 8), [], list(net.state_dict())
    wrapped.net = net
    nn.init.normal_(list(net.dec.values())[-1].weight)
    original = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: calls.append(1) or original(self, *a))

    def prepare(checkpoint, compiled, *networks):
        config = SimpleNamespace(checkpoint=checkpoint, compile=compiled)
        Run.prepare(SimpleNamespace(config=config, device="cpu"), *networks)

    gradients, counts = [], []
    for checkpoint in (False, True):
        prepare(checkpoint, False, wrapped)
        calls.clear()
        torch.manual_seed(1)  # dropout
        net(x, torch.zeros(2)).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
        counts.append(len(calls))
        net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and counts[1] == 2 * counts[0] > 0
    calls.clear()
    with torch.no_grad():
        net(x, torch.zeros(2))
    assert len(calls) == counts[0]
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    prepare(False, True, wrapped, net)
    assert compiled == [wrapped, net] and list(net.state_dict()) == names
