"""Calls of readers of foreign files, measured in a process of their own."""

import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass

import pytest
import torch

from common.teacher import load_teacher

MEASURED = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures in /proc")
SECONDS, MIB = 10, 1024  # what a refusal may take: of a core; above the import's own memory


def write(tmp_path, data, name="edm.pkl"):
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


def read(path):
    return load_teacher(path, "folder", torch.device("cpu"))


@dataclass
class Outcome:
    error: str  # its type, "" for none, "killed" for a crash or a hang
    text: str  # its message, or the type of what came back
    seconds: float
    mib: float  # most memory above what the process began with
    printed: str  # on stdout and stderr


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 2**10


def _child(call, pipe, output, seconds):
    import resource  # Windows has none: there these tests are skipped

    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    before, most = _status("VmRSS"), _status("VmSize") + 4 * MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    error = ""
    try:
        text = type(call()).__name__
    except BaseException as caught:
        error, text = type(caught).__name__, str(caught)
    mib = (_status("VmHWM") - before) / 2**20
    os.write(pipe, json.dumps([error, text[:5000], time.process_time(), mib]).encode())


def guarded(call, seconds=6 * SECONDS):
    """The Outcome of call() in a forked process, which a crash or a bomb cannot leave."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            try:
                _child(call, writer, output.fileno(), seconds)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        output.seek(0)
        printed = output.read().decode(errors="replace")
    fields = json.loads(answer) if answer else ["killed", "", seconds, float(MIB)]
    return Outcome(*fields, printed)


def one_line_refusal(call, *parts):
    """The message of call(), which must be refused, in bounds, in one printable line."""
    found = guarded(call)
    assert found.error == "UsageError", found
    assert found.text.isprintable() and len(found.text) < 700, found
    assert found.seconds < SECONDS and found.mib < MIB and not found.printed, found
    assert "weights_only" not in found.text and "MemoryError" not in found.text, found
    for part in parts:
        assert part in found.text, found
    return found
