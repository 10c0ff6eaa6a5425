"""common/training.py: what must hold when a run is started wrongly, stopped, killed, resumed, or spread over ranks."""
import http.client
import io
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import training
from common.training import Run, UsageError, option, parse_config

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    dataset: str = option("digits", "data set", choices=("digits", "mnist"))
    data_dir: str | None = option(None, "folder")
    seed: int = option(0, "seed")
    device: str = option("cpu", "device")
    out: str | None = option(None, "folder of the run")
    resume: bool = option(False, "go on")
    smoke: bool = option(False, "seconds")
    augment: bool = option(True, "flip images")
    labels: bool | None = option(None, "conditional")
    lr: float | None = option(None, "rate, 50% of it by default")
    widths: tuple[int, ...] = option((16, 32), "channels")
    levels: tuple[float, ...] | None = option(None, "noise levels")


PRESETS = {"digits": {"lr": 0.1, "levels": (2.0, 1.0), "labels": False}, "mnist": {"lr": 0.2, "levels": (3.0,), "labels": True}}
SMOKE = {"lr": 0.5}


def parse(*argv):
    return parse_config(Config, PRESETS, "A method.", list(argv))


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------- options

def test_flags_that_are_not_given_keep_their_defaults():
    assert parse() == Config()
    assert parse("--seed", "7") == Config(seed=7)


def test_flags_have_the_types_of_their_fields():
    config = parse("--data-dir", "/data", "--lr", "3e-4", "--no-augment", "--smoke", "--widths", "8", "16", "24", "--levels", "5", "0.5")
    assert config == Config(data_dir="/data", lr=3e-4, augment=False, smoke=True, widths=(8, 16, 24), levels=(5.0, 0.5))
    assert type(config.widths) is type(config.levels) is tuple  # as the default is: or --resume would call it another option
    assert type(config.levels[0]) is float and parse("--levels", "2").levels == (2.0,)
    assert parse("--labels").labels is True and parse("--no-labels").labels is False and parse("--augment").augment is True


@pytest.mark.parametrize("argv, pattern", [
    (["--sede", "1"], "unrecognized arguments: --sede"),
    (["--see", "1"], "unrecognized arguments: --see"),  # no abbreviations
    (["--seed", "one"], "--seed: invalid int value: 'one'"),
    (["--seed"], "--seed: expected one argument"),
    (["--lr", "1,5"], "--lr: invalid float value"),
    (["--dataset", "cifar"], "--dataset: invalid choice: 'cifar' .*digits.*mnist"),
    (["--widths"], "--widths: expected at least one argument"),
    (["--widths", "8", "x"], "--widths: invalid int value: 'x'"),
    (["stray"], "unrecognized arguments: stray"),
])
def test_wrong_flags_are_one_line(argv, pattern, capsys):
    with pytest.raises(UsageError, match=pattern) as error:
        parse(*argv)
    one_line(error)
    assert capsys.readouterr() == ("", "")  # no usage text of argparse in front of it


def test_help_tells_defaults_and_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A method." in text and "rate, 50% of it by default (default: by data set, see below)" in text
    assert "channels (default: (16, 32))" in text and "folder (default: None)" in text
    assert "mnist lr=0.2 levels=(3.0,) labels=True" in text


def test_presets_fill_what_is_none_and_nothing_else():
    config = parse("--dataset", "mnist", "--no-labels")
    training.fill_from_presets(config, PRESETS, SMOKE)
    assert (config.lr, config.levels, config.labels, config.data_dir) == (0.2, (3.0,), False, None)
    config = parse("--smoke")
    training.fill_from_presets(config, PRESETS, SMOKE)
    assert (config.lr, config.levels) == (0.5, (2.0, 1.0))
    config = parse("--smoke", "--lr", "0.3")
    training.fill_from_presets(config, PRESETS, SMOKE)
    assert config.lr == 0.3
    with pytest.raises(UsageError, match="--dataset imagenet: unknown, choose one of digits, mnist"):
        training.fill_from_presets(Config(dataset="imagenet"), PRESETS, SMOKE)


def test_require():
    training.require(True, "eval_n", 3, "never shown")
    with pytest.raises(UsageError, match="^--eval-n 3: at least 5$"):
        training.require(False, "eval_n", 3, "at least 5")


@pytest.mark.parametrize("error, code, line", [
    (UsageError("--nfe 0: at least 1"), 2, "prog.py: error: --nfe 0: at least 1\n"),
    (KeyboardInterrupt(), 130, "stopped\n"),
])
def test_cli_turns_errors_into_one_line_and_an_exit_code(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/prog.py"])

    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        training.cli(main)
    assert stop.value.code == code and capsys.readouterr() == ("", line)


def test_cli_hides_no_fault_of_ours(capsys):
    with pytest.raises(ZeroDivisionError):
        training.cli(lambda: 1 / 0)
    assert training.cli(lambda: None) is None


def test_devices():
    device, line = training.pick_device("cpu")
    assert device == torch.device("cpu") and "as asked" in line and "float32" in line
    device, line = training.pick_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu") and ("no CUDA" in line) == (device.type == "cpu")
    wrong = ["gpu", "cuda:99"] + ([] if torch.cuda.is_available() else ["cuda"])
    for name in wrong:
        with pytest.raises(UsageError, match=f"--device {name}: not available here .*; try --device cpu") as error:
            training.pick_device(name)
        one_line(error)


# ------------------------------------------------------------------------------------------------------------- randomness and EMA

def test_noise_of_an_image_depends_on_its_seed_alone():
    noise = training.noise_from_seeds([5, 6, 7, 2**40], (3, 4, 4))
    assert noise.dtype == torch.float64 and noise.shape == (4, 3, 4, 4)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(training.noise_from_seeds(torch.tensor([7, 5]), (3, 4, 4)), noise[[2, 0]])  # another batch, another order
    assert torch.equal(training.noise_from_seeds(range(6, 7), (3, 4, 4)), noise[1:2])
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    assert torch.equal(noise[0], torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5)).double())
    flat = training.noise_from_seeds(range(2000), (16,))
    assert abs(flat.mean()) < 5 / math.sqrt(flat.numel()) and abs(flat.var() - 1) < 5 * math.sqrt(2 / flat.numel())
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.999  # no two seeds share an image


def test_ema_update_is_its_formula():
    ema, net = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        for k, p in enumerate([*ema.parameters(), *net.parameters()]):
            p.copy_(torch.arange(3.0) + k)
        net.running_mean.fill_(4.0)
        net.num_batches_tracked.fill_(9)
    before = [p.detach().clone() for p in ema.parameters()]
    training.ema_update(ema, net, 0.75)
    for new, old, now in zip(ema.parameters(), before, net.parameters()):
        assert torch.allclose(new, 0.75 * old + 0.25 * now, rtol=0, atol=1e-6) and not torch.equal(old, now)
    assert torch.equal(ema.running_mean, net.running_mean) and ema.num_batches_tracked == 9
    assert all(p.requires_grad and p.grad is None for p in ema.parameters())
    training.ema_update(ema, net, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), net.parameters()))


def test_ema_decay():
    assert training.ema_decay(0, 64, 1000) == 0  # nothing seen: the EMA is the network
    assert training.ema_decay(10**9, 1000, 1000) == 0.5  # a batch of one half-life
    assert abs(training.ema_decay(10**9, 64, 500_000) ** (500_000 / 64) - 0.5) < 1e-9  # after `halflife` images half is forgotten
    assert abs(training.ema_decay(2000, 64, 500_000) - 0.5 ** (64 / 100)) < 1e-12  # at the start: 5 % of the images seen
    assert abs(training.ema_decay(2000, 64, 500_000, ramp=0.5) - 0.5 ** (64 / 1000)) < 1e-12


# -------------------------------------------------------------------------------------------------------------------------- files

def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert training.cache_dir() == tmp_path
    monkeypatch.setenv("FEWSTEP_CACHE", "")
    assert training.cache_dir() == Path.home() / ".cache" / "fewstep"


@pytest.mark.parametrize("error, shown", [
    (OSError(28, "No space left on device"), UsageError),
    (RuntimeError("PytorchStreamWriter failed writing file\nat line 2"), UsageError),
    (TypeError("not JSON"), TypeError),
    (KeyboardInterrupt(), KeyboardInterrupt),
])
def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error, shown):
    path = tmp_path / "deep" / "file.bin"
    training.atomic_write(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"half of the n")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error
    with pytest.raises(shown) as caught:
        training.atomic_write(path, crash)
    if shown is UsageError:
        assert f"cannot write {path}" in one_line(caught) and "what was saved there before is kept" in one_line(caught)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.bin"]
    training.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file.bin"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write .*file/below/x.json"):
        training.save_json(tmp_path / "file" / "below" / "x.json", {})
    with pytest.raises(TypeError):
        training.save_json(tmp_path / "x.json", {"a": object()})
    training.save_json(tmp_path / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]} and sorted(os.listdir(tmp_path)) == ["file", "x.json"]


def test_checkpoints_come_back_as_they_were(tmp_path):
    state = {"net": {"w": torch.randn(3, 2), "half": torch.ones(2, dtype=torch.bfloat16)}, "rng": torch.get_rng_state(), "step": 7,
             "config": {"lr": 0.1, "widths": (1, 2), "name": None, "on": True}, "history": [1.5, math.inf]}
    training.save_checkpoint(tmp_path / "c.pt", "teacher", state)
    back = training.load_checkpoint(tmp_path / "c.pt")
    assert back["fewstep"] == "teacher" and back["config"] == state["config"] and back["history"] == state["history"] and back["step"] == 7
    for a, b in [(back["net"]["w"], state["net"]["w"]), (back["net"]["half"], state["net"]["half"]), (back["rng"], state["rng"])]:
        assert a.dtype == b.dtype and torch.equal(a, b)


class Malice:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_foreign_files_are_refused_and_never_executed(tmp_path):
    trap, files = tmp_path / "executed", {name: tmp_path / name for name in ("raw", "zip", "pt", "list", "text", "empty", "cut")}
    files["raw"].write_bytes(pickle.dumps({"fewstep": Malice(trap)}, protocol=2))
    torch.save({"fewstep": "teacher", "net": Malice(trap)}, files["zip"])
    torch.save({"state_dict": {}}, files["pt"])  # somebody else's checkpoint
    torch.save(["fewstep"], files["list"])
    files["text"].write_text("hello\n" * 50)
    files["empty"].write_bytes(b"")
    whole = io.BytesIO()
    torch.save({"fewstep": "teacher", "w": torch.zeros(1000)}, whole)
    files["cut"].write_bytes(whole.getvalue()[:2000])
    for path in [*files.values(), tmp_path]:
        with pytest.raises(UsageError, match=f"^{re.escape(str(path))}: not a checkpoint of this project") as error:
            training.load_checkpoint(path)
        one_line(error)
    with pytest.raises(UsageError, match="nowhere.pt: no such checkpoint"):
        training.load_checkpoint(tmp_path / "nowhere.pt")
    assert not trap.exists()
    pickle.loads(files["raw"].read_bytes())
    assert trap.exists()  # the trap itself works


URL = "https://example.org/weights.pkl"


class Answer(io.BytesIO):
    """What urlopen gives: a body that may end early, or with an error, and the length that it should have."""

    def __init__(self, body, length=None, error=None):
        super().__init__(body)
        self.headers, self.error = {"Content-Length": str(length or len(body))}, error

    def read(self, size):
        chunk = super().read(2)
        if not chunk and self.error:
            raise self.error
        return chunk


def serve(monkeypatch, answer):
    def urlopen(url, timeout):
        assert url == URL and timeout > 0
        if isinstance(answer, Exception):
            raise answer
        return answer
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_download(monkeypatch, tmp_path, capsys):
    path = tmp_path / "cache" / "weights.pkl"
    serve(monkeypatch, Answer(b"tests"))
    assert training.download(URL, path, "the teacher") == path and path.read_bytes() == b"tests"
    assert "weights.pkl: 100%" in capsys.readouterr().err
    serve(monkeypatch, AssertionError("asked again"))
    assert training.download(URL, str(path), "the teacher") == path


FAILURES = {"no route": urllib.error.URLError("no route to host"), "404": urllib.error.HTTPError(URL, 404, "Not Found", None, None),
            "timeout": TimeoutError("timed out"), "no address": ValueError("unknown url type"), "cut off": Answer(b"test", 9),
            "broken": Answer(b"test", 9, http.client.IncompleteRead(b"te", 2)), "reset": Answer(b"test", 9, ConnectionResetError("reset"))}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_download_says_what_from_where_and_whither(monkeypatch, tmp_path, failure):
    path = tmp_path / "cache" / "weights.pkl"
    serve(monkeypatch, FAILURES[failure])
    with pytest.raises(UsageError) as error:
        training.download(URL, path, "the teacher of cifar10")
    message = one_line(error)
    assert message.startswith("the teacher of cifar10: could not download") and URL in message and f"put it at {path}" in message
    assert not path.exists() and not list(tmp_path.rglob("*.part"))


# ---------------------------------------------------------------------------------------------------------------------------- run

def make(out, **options):
    return Run("method", Config(out=str(out), **options), checkpoint_seconds=1e9)


def test_a_run_leaves_its_metrics_and_its_log(tmp_path, capsys):
    run = make(tmp_path / "run", seed=3)
    assert "method on digits: device cpu" in capsys.readouterr().out
    run.log(step=1, loss=0.5)
    run.log(step=2, loss=0.25)
    rows = [{"name": "ours", "nfe": 1, "fid": 1.0, "fid_features": "classifier", "fid_n": 10}]
    run.start -= 10
    run.metrics(rows, "shipped", extra=1)
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert set(metrics) == {"method", "dataset", "teacher", "seed", "device", "versions", "config", "seconds", "peak_memory_mb", "results",
                            "extra"}
    assert (metrics["method"], metrics["dataset"], metrics["teacher"], metrics["seed"]) == ("method", "digits", "shipped", 3)
    assert metrics["results"] == rows and metrics["config"]["seed"] == 3 and metrics["versions"]["torch"] == torch.__version__
    assert 10 <= metrics["seconds"] < 70 and 10 < metrics["peak_memory_mb"] < 1e6
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines] == [(1, 0.5), (2, 0.25)] and all(x["seconds"] >= 0 for x in lines)
    again = make(tmp_path / "run")
    assert len((run.out / "log.jsonl").read_text().splitlines()) == 2  # it may yet fail on a bad option: nothing is lost
    again.log(step=7)
    again.log(step=8)
    assert [json.loads(line)["step"] for line in (run.out / "log.jsonl").read_text().splitlines()] == [7, 8]  # its own log


def test_the_default_folder_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run("ld3", Config(dataset="mnist")).out == Path("runs/ld3-mnist") and (tmp_path / "runs/ld3-mnist/log.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out .*/file/run: cannot be written .*; choose another folder") as error:
        make(tmp_path / "file" / "run")
    one_line(error)


def train(out, interrupt=None, number=signal.SIGINT, last=9, resume=False, poison=None, checkpoint_seconds=1e9, **options):
    """Fit a line with momentum, noise from the global generator and an EMA; raise signal `number` in the middle of step `interrupt`."""
    run = Run("method", Config(out=str(out), resume=resume, **options), checkpoint_seconds)
    net = nn.Linear(2, 1)
    ema = nn.Linear(2, 1)
    ema.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    done, trace = [], []
    first = run.restore(parts)
    try:
        for step in run.steps(first, last, parts):
            x = torch.randn(8, 2)
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if step == interrupt:
                assert signal.getsignal(number) is not signal.SIG_DFL  # or pytest itself would die
                os.kill(os.getpid(), number)
            optimizer.step()
            training.ema_update(ema, net, 0.9)
            run.loss = loss.detach() * (math.nan if step == poison else 1)
            trace.append(loss.item())
            done.append(step)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        train.done = done
    return code, done, trace, {**net.state_dict(), **{f"ema.{k}": v for k, v in ema.state_dict().items()}}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, number, capsys):
    """A signal in the middle of step 3: the step ends, its state is saved, exit code 130; --resume goes on at step 4, bit for bit."""
    before = signal.getsignal(number)
    code, done, trace, state = train(tmp_path / "whole")
    assert code == 0 and done == list(range(9)) and trace[-1] != trace[0]
    code, done, first_half, _ = train(tmp_path / "halves", interrupt=3, number=number)
    assert code == 130 and done == [0, 1, 2, 3] and signal.getsignal(number) == before
    assert "stopped after step 4 of 9; the same command with --resume" in capsys.readouterr().out
    saved = training.load_checkpoint(tmp_path / "halves" / "checkpoint.pt")
    assert saved["fewstep"] == "method" and saved["step"] == 4 and saved["seconds"] > 0
    torch.randn(100)  # whatever happens in between
    code, done, second_half, resumed = train(tmp_path / "halves", resume=True)
    assert code == 0 and done == [4, 5, 6, 7, 8] and first_half + second_half == trace
    assert all(torch.equal(resumed[k], state[k]) for k in state)
    assert train(tmp_path / "halves", resume=True)[1] == []  # a finished run has nothing left to do
    assert signal.getsignal(number) == before
    steps = [json.loads(line)["step"] for line in (tmp_path / "halves" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 8  # the log goes on, too


def test_seconds_add_up_over_a_resume(tmp_path, monkeypatch):
    train(tmp_path, interrupt=2)
    state = training.load_checkpoint(tmp_path / "checkpoint.pt")
    training.save_checkpoint(tmp_path / "checkpoint.pt", "method", {**state, "seconds": 1000.0})
    assert 1000 < make(tmp_path, resume=True).seconds() < 1100


def test_checkpoints_fall_due(tmp_path):
    """With no seconds between checkpoints every step is saved: a crash in step 5 loses that step alone."""
    run = Run("method", Config(out=str(tmp_path)), checkpoint_seconds=0)
    net, seen = nn.Linear(1, 1), []
    for step in run.steps(0, 6, {"net": net}):
        if step:
            saved = training.load_checkpoint(tmp_path / "checkpoint.pt")
            seen.append(saved["step"])
            assert saved["parts"]["net"]["bias"].item() == step - 1
        nn.init.constant_(net.bias, step)
    assert seen == [1, 2, 3, 4, 5] and training.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    """Also where the loss is not due to be shown: the state of the poisoned step must not replace the last good one."""
    with pytest.raises(UsageError, match=r"training: the loss is nan at step 4; the last checkpoint is kept") as error:
        train(tmp_path, poison=4, checkpoint_seconds=0)
    one_line(error)
    assert train.done == [0, 1, 2, 3, 4] and training.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    with pytest.raises(UsageError, match="the loss is nan at step 0"):
        train(tmp_path / "first", poison=0)
    with pytest.raises(UsageError, match="the loss is nan at step 8"):
        train(tmp_path / "last", poison=8)
    assert not (tmp_path / "last" / "checkpoint.pt").exists()
    with pytest.raises(UsageError, match="the loss is nan at step 5"):
        train(tmp_path / "stopped", poison=5, interrupt=5)


def test_resume_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(UsageError, match="checkpoint.pt: no such checkpoint"):
        train(tmp_path / "empty", resume=True)
    train(tmp_path, interrupt=2, seed=1, widths=(8, 16))
    for options, pattern in [({"seed": 2}, "--seed 2: the checkpoint to resume has 1"),
                             ({"seed": 1, "lr": 0.1}, "--lr 0.1: the checkpoint to resume has None"),
                             ({"seed": 1, "widths": (8,)}, r"--widths \(8,\): the checkpoint to resume has \(8, 16\)")]:
        with pytest.raises(UsageError, match=pattern) as error:
            train(tmp_path, resume=True, **{"widths": (8, 16), **options})
        one_line(error)
    same = train(tmp_path, resume=True, seed=1, widths=(8, 16), data_dir="/elsewhere", device=str(torch.device("cpu", 0)), last=5)
    assert same[1] == [3, 4]  # these only say how and where
    state = training.load_checkpoint(tmp_path / "checkpoint.pt")
    training.save_checkpoint(tmp_path / "checkpoint.pt", "method", {**state, "fewstep": "other"})
    with pytest.raises(UsageError, match="--resume: .* belongs to other, not to method"):
        train(tmp_path, resume=True, seed=1, widths=(8, 16))


def test_only_what_a_run_left_half_written_is_swept(tmp_path):
    left = ["checkpoint.pt.12.part", "metrics.json.3.part", "samples.png.456.part", "states-abc_1.part/0"]
    mine = ["movie.mkv.part", "photos.part/a.jpg", "student.part", "a.2024.part"]
    for name in (*left, *mine):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    make(tmp_path)
    assert not any((tmp_path / name).exists() for name in left) and all((tmp_path / name).exists() for name in mine)


def test_a_restored_run_does_not_keep_the_checkpoint_in_memory(tmp_path):
    train(tmp_path, interrupt=2)
    run = make(tmp_path, resume=True)
    assert "parts" in run.restored and run.restore({}) == 3 and "parts" not in run.restored


def test_a_dear_checkpoint_is_made_seldom(tmp_path, monkeypatch):
    """At most a twentieth of the time goes into them."""
    clock, saves = [0.0], []
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    run = Run("method", Config(out=str(tmp_path)), checkpoint_seconds=10)
    monkeypatch.setattr(run, "save", lambda step, parts: saves.append(step) or clock.__setitem__(0, clock[0] + 5))
    for _ in run.steps(0, 400, {}):
        clock[0] += 1
    assert saves[:3] == [11, 112, 213] and saves[-1] == 400


def test_a_run_may_go_on_in_other_parts_and_be_measured_otherwise(tmp_path):
    def options(**changed):
        return training.TrainingOptions(**{"out": str(tmp_path), "device": "cpu", "eval_n": 10, "eval_batch": 5, **changed})

    Run("method", options()).save(3, {})
    changed = options(resume=True, eval_n=20, eval_batch=7, recall=True, reference="train", inception="x", batch_per_gpu=2, checkpoint=True,
                      compile=True)
    assert Run("method", changed).restored["step"] == 3
    with pytest.raises(UsageError, match="--dataset mnist: the checkpoint to resume has digits"):
        Run("method", options(resume=True, dataset="mnist"))


def test_options_from_the_command_line_resume_like_defaults(tmp_path):
    """`--widths 16 32` is the default, spelt out."""
    train(tmp_path, interrupt=1)
    spelt = parse("--widths", "16", "32", "--out", str(tmp_path), "--resume", "--device", "cpu")
    assert Run("method", spelt).restored["step"] == 2


def test_the_seed_decides_the_draws_of_a_run(tmp_path):
    draws = []
    for seed in (1, 1, 2):
        make(tmp_path, seed=seed)
        draws.append(torch.randn(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_table_has_the_columns_that_some_row_has():
    rows = [{"name": "a", "fid": None, "recall": None}, {"name": "b", "fid": 0.0}]
    assert [line.split() for line in training.table(rows, ["name", "nfe", *training.SCORES]).splitlines()] == [
        ["name", "fid"], ["a", "not", "run"], ["b", "0"]]


def test_a_table_says_what_was_not_run_and_on_what_a_fid_rests():
    rows = [{"name": "euler", "nfe": 5, "fid": None, "rmse": 0.123456},
            {"name": "ld3", "nfe": 5, "fid": 12.345678, "fid_features": "digits classifier", "fid_n": 1797},
            {"name": "teacher", "nfe": 20, "fid": 1.5}]
    lines = training.table(rows, ["name", "nfe", "fid", "rmse"]).splitlines()
    assert re.split(r"  +", lines[0].strip()) == ["name", "nfe", "fid [digits classifier, n=1797]", "rmse"]
    assert [re.split(r"  +", line.strip()) for line in lines[1:]] == [
        ["euler", "5", "not run", "0.1235"], ["ld3", "5", "12.35", "not run"], ["teacher", "20", "1.5", "not run"]]
    assert len({len(line) for line in lines}) == 1  # aligned


# --------------------------------------------------------------------------------------------------------------------- many ranks

def test_one_rank_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    net = nn.Linear(2, 1)
    net(torch.ones(1, 2)).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    training.average_gradients(net.parameters())
    assert training.rank_and_world() == (0, 1) and all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before))


def test_one_rank_has_all_rows_and_sums(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = torch.arange(6.0).view(3, 2)
    assert training.share_of(7) == slice(0, 7) and torch.equal(training.gather_rows(rows), rows)
    assert torch.equal(training.sum_over_ranks(rows.clone()), rows)


# ----------------------------------------------------------------------------------------------------------------- large networks

@pytest.mark.parametrize("at_most", [None, 1, 3, 4, 7, 100])
def test_parts_of_a_batch_add_up_to_its_gradient(at_most):
    torch.manual_seed(0)
    net, x, y, seen = nn.Linear(3, 1).double(), torch.randn(7, 3).double(), torch.randn(7, 1).double(), []

    def loss_of(x, y, nothing):
        assert nothing is None
        seen.append(len(x))
        return (net(x) - y).square().mean()

    expected = (net(x) - y).square().mean()
    gradients = torch.autograd.grad(expected, list(net.parameters()))
    total = training.accumulate(loss_of, (x, y, None), at_most)
    assert not total.requires_grad and total.item() == pytest.approx(expected.item())
    assert max(seen) == min(at_most or 7, 7) and sum(seen) == 7
    for parameter, gradient in zip(net.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient)
    training.accumulate(loss_of, (x, y, None), at_most, inputs=[net.bias])
    torch.testing.assert_close(net.bias.grad, 2 * gradients[1])
    torch.testing.assert_close(net.weight.grad, gradients[0])  # was not asked for


def test_too_few_images_to_judge_are_refused_at_once():
    for options, least in ((dict(eval_n=1), 2), (dict(eval_n=3, recall=True), 4), (dict(eval_batch=0), 1), (dict(batch_per_gpu=0), 1)):
        name, value = next(iter(options.items()))
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}: must be at least {least}"):
            training.fill_from_presets(training.TrainingOptions(**options), {"digits": {}}, {})
    training.fill_from_presets(training.TrainingOptions(eval_n=3), {"digits": {}}, {})


def test_whole_batches_are_not_rescaled():
    """Bitwise what loss.backward() gives."""
    x = torch.randn(7, requires_grad=True)
    training.accumulate(lambda rows: (rows * x).square().mean() / 3, (torch.ones(7),))
    accumulated, x.grad = x.grad, None
    ((torch.ones(7) * x).square().mean() / 3).backward()
    assert torch.equal(accumulated, x.grad)


def test_checkpoint_recomputes_the_same_gradients_and_compile_keeps_the_names(monkeypatch):
    from common.unet import Block, ddpmpp
    torch.manual_seed(0)
    net = ddpmpp(8, 1, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.2)
    wrapped, x, calls, names = nn.Module(), torch.randn(2, 1, 8, 8), [], list(net.state_dict())
    wrapped.net = net
    nn.init.normal_(list(net.dec.values())[-1].weight)
    original = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: calls.append(1) or original(self, *a))
    gradients, counts = [], []
    for checkpoint in (False, True):
        training.prepare(SimpleNamespace(checkpoint=checkpoint, compile=False), wrapped)
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
    training.prepare(SimpleNamespace(checkpoint=False, compile=True), wrapped, net)
    assert compiled == [wrapped, net] and list(net.state_dict()) == names


RANK = """
import sys, torch
from common.training import Run, average_gradients, cli, rank_and_world
sys.path.insert(0, "tests")
from test_training import Config

def main():
    rank, world = rank_and_world(torch.device("cpu"))
    assert world == 2 and rank_and_world() == (rank, 2)
    a, frozen, b = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((2, 3), (4,), (5,)))
    a.grad, b.grad = torch.arange(6.0).view(2, 3) * (rank + 1), torch.full((5,), 10.0 * rank - 3)
    average_gradients([a, frozen, b])
    assert torch.equal(a.grad, torch.arange(6.0).view(2, 3) * 1.5) and torch.equal(b.grad, torch.full((5,), 2.0)) and frozen.grad is None
    run = Run("method", Config(out=sys.argv[1]))
    assert (run.rank, run.world) == (rank, 2)
    net = torch.nn.Linear(1, 1)
    for step in run.steps(0, 3, {"net": net}):
        run.loss = torch.tensor(float(rank))
    run.metrics([{"rank": rank}], "none")
    print("good", rank)

cli(main)
"""


@pytest.mark.slow
def test_gradients_are_averaged_over_two_ranks_and_rank_0_alone_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT,
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for r in range(2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
    assert "good 0" in outputs[0] and "good 1" in outputs[1]
    assert "method on digits" in outputs[0] and "method on digits" not in outputs[1]
    assert json.loads((tmp_path / "metrics.json").read_text())["results"] == [{"rank": 0}]
    assert all(json.loads(line)["loss"] == 0.5 for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert training.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
