"""common/machinery/files.py: files are whole or not there, foreign ones are refused, locks hold."""

import http.client
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from common import UsageError
from common.machinery import files

ROOT = Path(__file__).parent.parent


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert files.cache_dir() == tmp_path
    monkeypatch.setenv("FEWSTEP_CACHE", "")
    assert files.cache_dir() == Path.home() / ".cache" / "fewstep"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UsageError, match="set FEWSTEP_CACHE to a folder") as error:
        files.cache_dir()
    one_line(error)


# ------------------------------------------------------------------------------ atomic writes


@pytest.mark.parametrize(
    "error, shown",
    [
        (OSError(28, "No space left on device"), UsageError),
        (RuntimeError("PytorchStreamWriter failed writing file\nat line 2"), UsageError),
        (TypeError("not JSON"), TypeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error, shown):
    path = tmp_path / "deep" / "file.bin"
    files.atomic_write(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"half of the n")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error

    with pytest.raises(shown) as caught:
        files.atomic_write(path, crash)
    if shown is UsageError:
        message = one_line(caught)
        assert f"cannot write {path}" in message
        assert "what was saved there before is kept" in message
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.bin"]
    os.link(path, tmp_path / "old.bin")  # a second name: the new file is another one
    files.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file.bin"]
    assert (tmp_path / "old.bin").read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write .*file/below/x.json"):
        files.save_json(tmp_path / "file" / "below" / "x.json", {})
    with pytest.raises(TypeError):
        files.save_json(tmp_path / "x.json", {"a": object()})
    files.save_json(tmp_path / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}
    assert sorted(os.listdir(tmp_path)) == ["file", "x.json"]


# -------------------------------------------------------------------------------- checkpoints


def test_checkpoints_come_back_as_they_were(tmp_path):
    state = {
        "net": {"w": torch.randn(3, 2), "half": torch.ones(2, dtype=torch.bfloat16)},
        "rng": torch.get_rng_state(),
        "step": 7,
        "config": {"lr": 0.1, "widths": (1, 2), "name": None, "on": True},
        "history": [1.5, math.inf],
    }
    files.save_checkpoint(tmp_path / "c.pt", "teacher", state)
    back = files.load_checkpoint(tmp_path / "c.pt")
    assert back["fewstep"] == "teacher"
    assert all(back[name] == state[name] for name in ("config", "history", "step"))
    torch.testing.assert_close(back["rng"], state["rng"], rtol=0, atol=0)
    torch.testing.assert_close(back["net"], state["net"], rtol=0, atol=0)


class Malice:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_foreign_files_are_refused_and_never_executed(tmp_path):
    trap = tmp_path / "executed"
    names = ("raw", "zip", "pt", "list", "text", "empty", "cut")
    paths = {name: tmp_path / name for name in names}
    paths["raw"].write_bytes(pickle.dumps({"fewstep": Malice(trap)}, protocol=2))
    torch.save({"fewstep": "teacher", "net": Malice(trap)}, paths["zip"])
    torch.save({"state_dict": {}}, paths["pt"])  # somebody else's checkpoint
    torch.save(["fewstep"], paths["list"])
    paths["text"].write_text("hello\n" * 50)
    paths["empty"].write_bytes(b"")
    whole = io.BytesIO()
    torch.save({"fewstep": "teacher", "w": torch.zeros(1000)}, whole)
    paths["cut"].write_bytes(whole.getvalue()[:2000])
    for path in [*paths.values(), tmp_path]:
        pattern = f"^{re.escape(str(path))}: not a checkpoint of this project, or cut short"
        with pytest.raises(UsageError, match=pattern) as error:
            files.load_checkpoint(path)
        one_line(error)
    with pytest.raises(UsageError, match="nowhere.pt: no such checkpoint"):
        files.load_checkpoint(tmp_path / "nowhere.pt")
    assert not trap.exists()
    pickle.loads(paths["raw"].read_bytes())
    assert trap.exists()  # the trap itself works


# ---------------------------------------------------------------------------------- downloads

URL = "https://example.org/weights.pkl"


class Response(io.BytesIO):
    """What urlopen gives: its body may be shorter than its stated length, or end with an error."""

    def __init__(self, body, length=None, error=None):
        super().__init__(body)
        self.headers, self.error = {"Content-Length": str(length or len(body))}, error

    def read(self, size):
        chunk = super().read(2)
        if not chunk and self.error:
            raise self.error
        return chunk


def serve(monkeypatch, response):
    def urlopen(url, timeout):
        assert url == URL and timeout > 0
        if isinstance(response, Exception):
            raise response
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_download(monkeypatch, tmp_path, capsys):
    path = tmp_path / "cache" / "weights.pkl"
    serve(monkeypatch, Response(b"tests"))
    assert files.download(URL, path, "the teacher") == path and path.read_bytes() == b"tests"
    assert "weights.pkl: 100%" in capsys.readouterr().err
    serve(monkeypatch, AssertionError("downloaded again"))
    assert files.download(URL, str(path), "the teacher") == path


FAILURES = {
    "no route": urllib.error.URLError("no route to host"),
    "404": urllib.error.HTTPError(URL, 404, "Not Found", None, None),
    "timeout": TimeoutError("timed out"),
    "no address": ValueError("unknown url type"),
    "cut off": Response(b"test", 9),
    "broken": Response(b"test", 9, http.client.IncompleteRead(b"te", 2)),
    "reset": Response(b"test", 9, ConnectionResetError("reset")),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_download_names_what_was_wanted_and_both_places(monkeypatch, tmp_path, failure):
    path = tmp_path / "cache" / "weights.pkl"
    serve(monkeypatch, FAILURES[failure])
    with pytest.raises(UsageError) as error:
        files.download(URL, path, "the teacher of cifar10")
    message = one_line(error)
    assert message.startswith("the teacher of cifar10: could not download")
    assert URL in message and f"put it at {path}" in message
    assert not path.exists() and not list(tmp_path.rglob("*.part"))


# -------------------------------------------------------------------------------------- locks

HOLDER = """
import sys, time
from pathlib import Path
from common.machinery.files import locked

name, folder = sys.argv[1], Path(sys.argv[2])
(folder / f"{name} asks").touch()
with locked(folder / "cache" / "file"):
    (folder / f"{name} has it").touch()
    while not (folder / f"{name} may go").exists():
        time.sleep(0.01)
    (folder / f"{name} leaves").touch()
"""


def wait_for(path, process):
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() in (None, 0), process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path.name}: not within a minute")


def test_two_processes_exclude_each_other(tmp_path):
    """The second waits while the first holds the lock, and gets it when the first leaves."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(name):
        command = [sys.executable, "-c", HOLDER, name, str(tmp_path)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    with start("first") as first, start("second") as second:
        try:
            wait_for(tmp_path / "first asks", first)
            wait_for(tmp_path / "second asks", second)
            while not (has := list(tmp_path.glob("* has it"))):
                time.sleep(0.01)
            time.sleep(0.3)  # time enough for the other, if nothing kept it
            assert len(list(tmp_path.glob("* has it"))) == 1
            ahead = has[0].name.split()[0]
            behind = "second" if ahead == "first" else "first"
            (tmp_path / f"{ahead} may go").touch()
            wait_for(tmp_path / f"{behind} has it", first if behind == "first" else second)
            assert (tmp_path / f"{ahead} leaves").exists()
            (tmp_path / f"{behind} may go").touch()
            assert [process.wait(timeout=60) for process in (first, second)] == [0, 0]
        finally:
            first.kill()
            second.kill()


def test_a_lock_sweeps_what_a_killed_process_left_half_written(tmp_path):
    left, kept = tmp_path / "file.npz.123.part", tmp_path / "other.npz.5.part"
    left.write_text("half")
    kept.write_text("of another file")
    with files.locked(tmp_path / "file.npz"):
        assert not left.exists() and kept.exists()


def test_a_lock_that_is_held_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    held = threading.Event()

    def hold():
        with FileLock(tmp_path / "file.lock"):
            held.set()
            time.sleep(0.3)

    threading.Thread(target=hold).start()
    held.wait()
    with files.locked(tmp_path / "file"):
        assert "waiting for another process" in capsys.readouterr().out


def test_a_lock_is_released_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "file"):
            raise ZeroDivisionError


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="set FEWSTEP_CACHE to another folder") as error:
        with files.locked(tmp_path / "file" / "below" / "x"):
            pass
    assert str(tmp_path / "file" / "below") in one_line(error)
