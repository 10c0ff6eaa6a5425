"""Every script killed, stopped, out of disk space: it loses one step and ends the same, bitwise.

Python and torch take seconds to start, a kill takes milliseconds: one process imports everything
once and forks a child per attempt. Run as a program, this file is that process: a job (JSON) per
line in, the exit code of the child that ran it (-9: killed) per line out.
"""

import functools
import getpass
import importlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import progressive
from common import UsageError
from common.machinery import files
from common.machinery.files import load_checkpoint, save_checkpoint
from common.machinery.options import cli
from common.machinery.plots import save_rows
from common.machinery.run import Run
from common.teacher import load_teacher
from scripts import differences

ROOT = Path(__file__).parent.parent
NET = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8]}
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
METHODS = ("progressive", "ld3", "dode", "cfd", "cud", "distributional", "common.teacher")
# Places in atomic_write where a child can kill itself.
PLACES = ("open", "half", "written", "synced", "renamed")


# -------------------------------------------------------------------- the forking process


class SlowFile:
    """A file that is written in small pieces; before each, `die` gets the bytes written so far."""

    def __init__(self, file, die):
        self.file, self.die, self.done = file, die, 0

    def write(self, data):
        data = memoryview(data).cast("B")
        for start in range(0, len(data), 4096):
            self.die(self.done)
            self.file.write(data[start : start + 4096])
            self.file.flush()
            self.done += len(data[start : start + 4096])
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def die_while_writing(place, count, half):
    """Arrange that this process kills itself at `place` of the `count`-th writing of a checkpoint.

    half: bytes that are half of it.
    """
    write, fsync, replace = files.atomic_write, os.fsync, os.replace

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def atomic_write(path, content):
        nonlocal count
        count -= Path(path).name == "checkpoint.pt"
        if count or Path(path).name != "checkpoint.pt":
            return write(path, content)

        def slowly(file):
            if place == "open":
                die()
            content(SlowFile(file, lambda done: place == "half" and done >= half and die()))
            if place == "written":
                die()

        os.fsync = lambda number: (fsync(number), place == "synced" and die())
        os.replace = lambda a, b: (replace(a, b), place == "renamed" and die())
        write(path, slowly)
        raise AssertionError(f"this process should have died when the file was {place}")

    files.atomic_write = atomic_write


def child(job):
    """Run the job as the script would, but with a checkpoint after every step; never returns."""
    module = importlib.import_module(job["method"])
    options = {}
    for name, value in job["options"].items():
        options[name] = tuple(value) if isinstance(value, list) else value
    with open(job["output"], "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    original = Run.__init__

    def init(self, method, config, **_):
        original(self, method, config, checkpoint_seconds=job.get("seconds", 0))

    Run.__init__ = init
    if "die" in job:
        die_while_writing(*job["die"])
    if "largest" in job:  # no file may grow beyond: as on a full disk, with EFBIG for ENOSPC
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
    sys.argv = [f"{job['method']}.py"]

    def main():
        config = module.Config(**options)
        if job["method"] == "ld3":
            run, device = Run("ld3", config), torch.device("cpu")
            teacher = load_teacher(config.teacher, config.dataset, device)
            trained = module.train(config, run, teacher, module.make_distance(config, device))
        else:
            trained = (module.fit if job["method"] == "dode" else module.train)(config)
        result = {"result": plain(trained)}
        save_checkpoint(Path(options["out"]) / "result.pt", "result", result)

    cli(main)


def plain(result):
    """What a training returns, for a checkpoint: grids, lambdas, weights of networks, losses."""
    if hasattr(result, "state_dict"):
        return result.state_dict()
    if isinstance(result, dict):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, (tuple, list)):
        return [plain(value) for value in result]
    return result if isinstance(result, (torch.Tensor, int, float, str)) else None


def serve():
    torch.set_num_threads(1)
    for method in METHODS:
        importlib.import_module(method)
    weight = torch.ones(2, requires_grad=True)  # the first steps of optimizers import much more
    adam, rmsprop = torch.optim.Adam([weight], fused=True), torch.optim.RMSprop([weight])
    for optimizer in (adam, rmsprop, torch.optim.SGD([weight])):
        weight.square().sum().backward()
        optimizer.step()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(job)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        until = time.perf_counter() + job.get("kill_after", 600)
        while (status := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.perf_counter() > until:
                os.kill(pid, signal.SIGKILL)  # still ours: it is not waited for yet
                status = os.waitpid(pid, 0)
                break
            time.sleep(0.001)
        print(os.waitstatus_to_exitcode(status[1]), flush=True)


if __name__ == "__main__":
    serve()


# -------------------------------------------------------------------------- the trainings


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """A function: job -> exit code."""
    temporary = tmp_path_factory.mktemp("temporary")
    ours = {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), **QUIET}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, __file__]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ours}, **pipes) as process:
        assert process.stdout.readline() == "ready\n"

        def run(method, options, **more):
            job = {"method": method, "options": options, "output": f"{options['out']}.txt", **more}
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        def finish(method, out, tiny):
            """Train from a checkpoint, if there is one, to the end."""
            resume = (Path(out) / "checkpoint.pt").exists()
            code = run(method, options_of(method, out, tiny, resume))
            assert code == 0, Path(f"{out}.txt").read_text()[-2000:]

        run.temporary, run.finish = temporary, finish
        yield run
        process.stdin.close()


# Short steps, every kind of state: EMA, flips, stages, three trainings, moved latents, a
# discriminator. LD3's rates are so high that the last grid is not the best.
OPTIONS = {
    "progressive": dict(from_steps=4, updates=8, batch_size=8, flip=True),
    "ld3": dict(
        nfe=3, steps=36, theta1_steps=6, train_n=6, valid_n=2, batch_size=2, teacher_nfe=6,
        lr_latent=1e4, lr1=0.03,
    ),
    "dode": dict(nfe=[3, 4, 5], solver=["ddim", "heun", "deis2"], scale=4, fit_n=12, fit_batch=4),
    "cfd": dict(from_steps=4, cfd_from=2, updates=8, batch_size=8),
    "cud": dict(
        **NET, rk="23", independent=False, shakedrop=True, dropout=0.1, steps=6, batch_size=8,
        warmup=2, baseline=True, distill_steps=2, distill_n=8, encoder_channels=8,
    ),
    "distributional": dict(smoke=True, images=192, batch_size=8, r1_every=4),
    "common.teacher": dict(**NET, steps=24, batch_size=8, warmup=4),
}


def options_of(method, out, tiny, resume=False):
    more = {} if method in ("cud", "common.teacher") else {"teacher": tiny}
    save = {"save": f"{out}/teacher.safetensors"} if method == "common.teacher" else {}
    given = {"out": str(out), "device": "cpu", "resume": resume, "seed": 3}
    return {**OPTIONS[method], **more, **save, **given}


def left_behind(out):
    """All that a run is: its last checkpoint, the models it wrote, what it returned.

    The checkpoint has weights, averages, optimizers and random generators.
    """
    found = {path.name: load_checkpoint(path) for path in sorted(Path(out).glob("*.pt"))}
    return found | {path.name: load_file(path) for path in Path(out).glob("*.safetensors")}


def same(whole, out):
    whole, found = dict(whole), left_behind(out)
    for run in (whole, found):
        run["checkpoint.pt"] = {**run["checkpoint.pt"], "config": 0}
    places = differences(whole, found)
    assert not places, f"not as in the uninterrupted run: {places[:10]}"


@pytest.fixture(scope="module")
def uninterrupted(forks, tiny, tmp_path_factory):
    """A function: method -> what its uninterrupted training leaves behind, and its seconds."""

    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp(method)
        for out in (folder / "first", folder / "whole"):  # the first fills the cache
            start = time.perf_counter()
            forks.finish(method, out, tiny)
        run.folders[method] = out
        return left_behind(out), time.perf_counter() - start

    run.folders = {}
    return run


def missing(at, kills):
    """Whether kills are missing, or have all hit the same places."""
    return len(at) < kills or len(set(at)) < max(2, kills // 4)


def kill_and_resume(forks, method, tiny, uninterrupted, folder, kills):
    """Train again and again, killed at random moments, until `kills` of them have hit.

    What every killed and every finished training leaves behind is checked. Returns the number of
    steps that were saved at every kill (None: no checkpoint yet).
    """
    whole, seconds = uninterrupted(method)
    rng, at, run, before, attempts = random.Random(method), [], 0, None, 0
    out = folder / "0"
    while (more := missing(at, kills)) or run == 0:
        attempts += 1
        assert attempts < 5 * kills, f"the kills do not land everywhere: {at}"
        resume = (out / "checkpoint.pt").exists()
        delay = rng.uniform(0, 0.7 * seconds) if more else 600
        delay = delay if at else 0.0  # the very first before any checkpoint
        code = forks(method, options_of(method, out, tiny, resume), kill_after=delay)
        if code == -signal.SIGKILL:
            assert not resume or (out / "checkpoint.pt").exists()
            saved = None
            if (out / "checkpoint.pt").exists():
                saved = load_checkpoint(out / "checkpoint.pt")["step"]
            assert not resume or saved >= before, f"{saved} steps are saved, {before} were before"
            at.append(saved)
            before = saved
        else:
            assert code == 0, Path(f"{out}.txt").read_text()[-2000:]
            same(whole, out)
            run += 1
            out = folder / str(run)
    print(f"{method}: {len(at)} kills, saved steps {at}, {run} trainings finished")
    print(f"one alone takes {seconds:.2f} s")
    return at


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_and_resumed_it_ends_as_if_it_had_not_been(
    method, forks, tiny, uninterrupted, tmp_path
):
    kills = 20 if method == "progressive" else 5
    at = kill_and_resume(forks, method, tiny, uninterrupted, tmp_path, kills)
    assert len(at) >= kills and at[0] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,places", [("progressive", PLACES), *((method, ("half",)) for method in METHODS[1:])]
)
def test_killed_while_a_checkpoint_is_written(method, places, forks, tiny, uninterrupted, tmp_path):
    """Between opening the temporary file and the rename.

    The checkpoint before is whole, and what is left of the new one does no harm.
    """
    whole, _ = uninterrupted(method)
    last, rng = whole["checkpoint.pt"]["step"], random.Random(method)
    half, at = os.stat(uninterrupted.folders[method] / "checkpoint.pt").st_size // 2, []
    for place in places:
        out = tmp_path / place
        for first in (True, False):  # the first checkpoint of all, then one that replaces another
            count = 1 if first else rng.randrange(2, last - 2)
            code = forks(method, options_of(method, out, tiny), die=(place, count, half))
            assert code == -signal.SIGKILL, Path(f"{out}.txt").read_text()[-2000:]
            parts, saved = list(out.glob("checkpoint.pt.*.part")), out / "checkpoint.pt"
            # It died between the opening and the rename, or just after that.
            assert len(parts) == (place != "renamed")
            if place in ("open", "half"):
                with pytest.raises(UsageError, match="not a checkpoint"):
                    load_checkpoint(parts[0])
            if place == "half":
                assert 0 < half <= parts[0].stat().st_size
            at.append((place, count, parts[0].stat().st_size if parts else None))
            renamed = count if place == "renamed" else count - 1
            assert (load_checkpoint(saved)["step"] if saved.exists() else 0) == renamed
            forks.finish(method, out, tiny)
            same(whole, out)
            for file in out.iterdir():
                file.unlink()
    print(f"{method}: killed at (place, number of the checkpoint, bytes of the new file) {at}")
    print(f"a whole one has about {2 * half}")


def config_of(out, **more):
    return progressive.Config(out=str(out), device="cpu", **more)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["progressive", "dode"])
def test_what_killed_runs_left_half_written_is_swept_away(method, forks, tiny, tmp_path):
    out = tmp_path / "run"
    for _ in range(3):
        code = forks(method, options_of(method, out, tiny), die=("written", 1, 0))
        assert code == -signal.SIGKILL
        assert len(list(out.glob("*.part"))) == 1
    (out / "users.txt").write_text("kept")
    forks.finish(method, out, tiny)
    assert not list(out.glob("*.part")) and (out / "users.txt").exists()
    outside = {path.name for path in forks.temporary.iterdir()}  # of its folder: nothing of ours
    locks = {name for name in outside if re.fullmatch(r"fewstep-[0-9a-f]{16}\.lock", name)}
    assert locks and outside - locks <= {f"torchinductor_{getpass.getuser()}"}


# -------------------------------------------------------------------------------- signals


@pytest.mark.slow
def test_the_program_stops_at_a_signal(tiny, tmp_path):
    """`python progressive.py`, stopped by SIGTERM, resumed, stopped by Ctrl-C, resumed.

    The end is that of an uninterrupted run.
    """

    def program(out, *more):
        options = ["--smoke", "--teacher", tiny, "--updates", "150", "--device", "cpu"]
        command = [sys.executable, "progressive.py", *options, "--out", str(out), *more]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **QUIET}, **pipes)

    with program(tmp_path / "whole") as whole:
        assert whole.communicate(timeout=120) and whole.returncode == 0
    out, saved, lines = tmp_path / "parts", 0, 0
    log = out / "log.jsonl"

    def logged():
        return len(log.read_text().splitlines()) if log.exists() else 0

    for number in (signal.SIGTERM, signal.SIGINT):
        with program(out, *["--resume"] * (saved > 0)) as part:
            while part.poll() is None and logged() <= lines:  # its first step is not done
                time.sleep(0.01)
            time.sleep(random.Random(int(number)).uniform(0.05, 0.3))
            part.send_signal(number)
            printed, errors = part.communicate(timeout=60)
        assert part.returncode == 130 and not (out / "metrics.json").exists(), errors
        before, lines = saved, logged()
        pattern = r"stopped after step (\d+) of (\d+); the same command with --resume"
        step, count = map(int, re.search(pattern, printed).groups())
        saved = load_checkpoint(out / "checkpoint.pt")["step"]
        assert before < saved < 600  # two stages of 300 updates
        assert count == 300 and step == saved - 300 * ((saved - 1) // 300)
    with program(out, "--resume") as rest:
        assert rest.communicate(timeout=120) and rest.returncode == 0
    same(left_behind(tmp_path / "whole"), out)
    paths = (tmp_path / name / "metrics.json" for name in ("whole", "parts"))
    one, other = (json.loads(path.read_text())["results"] for path in paths)
    assert one == other


# ----------------------------------------------------------------------------- full disks


def refused(code, output, *words):
    """Exit code 2, and one line that says what could not be written."""
    text = re.split(r"[\r\n]+", output.read_text())
    assert code == 2, "\n".join(text[-30:])
    errors = [line for line in text if ": error: " in line]
    assert len(errors) == 1 and not any("Traceback" in line for line in text), "\n".join(text[-30:])
    assert all(word in errors[0] for word in words), errors


OBSTACLES = [*((method, "full disk") for method in METHODS)]
OBSTACLES += [("progressive", "full log"), ("progressive", "closed folder")]


@pytest.mark.slow
@pytest.mark.parametrize("method, obstacle", OBSTACLES)
def test_what_cannot_be_written_is_reported_and_the_checkpoint_before_survives(
    method, obstacle, forks, tiny, uninterrupted, tmp_path
):
    """On the full disk no file may grow beyond half a checkpoint: the next one fails in its middle.

    /dev/full opens, but every write says ENOSPC; in the folder no temporary file can be made.
    """
    whole, _ = uninterrupted(method)
    out = tmp_path / "run"
    assert forks(method, options_of(method, out, tiny), die=("renamed", 3, 0)) == -signal.SIGKILL
    saved_at, log, output = out / "checkpoint.pt", out / "log.jsonl", Path(f"{out}.txt")
    saved, more = saved_at.read_bytes(), {}
    output.write_text("")
    if obstacle == "full disk":
        more, said = {"largest": len(saved) // 2}, (f"cannot write {saved_at}", "File too large")
    elif obstacle == "full log":
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        log.rename(out / "log")
        log.symlink_to("/dev/full")
        said = f"cannot write {log}", "No space left on device"
    else:
        out.chmod(0o555)
        if os.access(out, os.W_OK):
            pytest.skip("root may write anywhere")
        said = "cannot", str(out)
    code = forks(method, options_of(method, out, tiny, resume=True), **more)
    refused(code, output, *said)
    assert saved_at.read_bytes() == saved and load_checkpoint(saved_at)["step"] == 3
    assert not list(out.glob("*.part"))
    out.chmod(0o755)
    if obstacle == "full log":
        log.unlink()
        (out / "log").rename(log)
    forks.finish(method, out, tiny)
    same(whole, out)
    if method == "progressive":
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == sorted(steps) and steps[-1] == whole["checkpoint.pt"]["step"] - 1


def test_a_picture_on_a_full_disk_is_one_line(tmp_path, capsys):
    """What there was before is kept, as with a checkpoint; the run goes on to its numbers."""
    (tmp_path / "samples.png").write_text("old")
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that comes with it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        save_rows(tmp_path / "samples.png", {"noise": images})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    pattern = f"{tmp_path}/samples.png could not be drawn .cannot write .*File too large.*\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)
    assert (tmp_path / "samples.png").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_log_on_a_full_disk_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    run = Run("progressive", config_of(tmp_path))
    pattern = f"^cannot write {tmp_path}/log.jsonl .No space left on device.[^\n]*$"
    with pytest.raises(UsageError, match=pattern):
        run.log(step=1, loss=0.5)
