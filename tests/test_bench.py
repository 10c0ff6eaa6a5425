"""tests/bench.py runs, every part of it, in a tiny form. No number is asserted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_part_of_the_bench_runs():
    command = [sys.executable, "tests/bench.py", "tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for pattern, count in (
        (r"^  (b?float\d+), (contiguous|channels)\S* +[\d.]+ ms", 4),
        (r"^  (euler|heun|ipndm|dpmpp|dpm2|deis|unipc) +[\d.]+x", 7),
        (r"^  (plain|--checkpoint) +nfe  4: +-?\d+ MiB", 2),
        (r"^  (digits|tiny) +batch .* --freeze (none|conv) .* trained", 4),
        (r"^  float32 +batch .* images/s", 1),
        (r"^  bfloat16(, compiled)? +batch .* images/s", 2),
        (r"^  ld3 (plain|--checkpoint) +nfe  4: +[\d.]+ s per update", 2),
        (r"^  dode nfe  4: +[\d.]+ s for all \(ddim [\d.]+, ipndm", 1),
    ):
        assert len(re.findall(pattern, done.stdout, re.M)) == count, (pattern, done.stdout)
