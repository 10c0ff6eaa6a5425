"""tests/bench.py runs, every part of it, in a tiny form. No number is asserted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.precision import has_bf16

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_part_of_the_bench_runs():
    command = [sys.executable, "tests/bench.py", "tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = r" +[\d.]+ +[\d.]+ +[\d.]+ "  # min, median, max
    share = r"\d+ % of a product's \d+ GFLOP/s"
    for pattern, count in (
        (rf"^  digits, batch 128, (forward|\+ backward) {ratios} +{share}$", 2),
        (rf"^  digits, .*(both bf16|bf16 / fp32) {ratios} +{share}$", 4 * has_bf16("cpu")),
        (rf"^  (euler|heun|ipndm|dpmpp|dpm2|deis|unipc)\d? {ratios} +[\d.]+ copies", 8),
        (rf"^  16 features {ratios} +[\d.]+ such products; differs by \de-1\d", 1),
        (rf"^  \(3, 8, 8\), flips {ratios} ", 1),
        (rf"^  (teacher|progressive|cfd|cud|distributional|ld3, nfe 4|dode, nfe 5) {ratios}", 7),
        (rf"^  b?float\d+, (contiguous|channels)\S* {ratios} +[\d.]+ ms", 4),
        (r"^  (plain|--checkpoint) +nfe  4: +-?\d+ MiB", 2),
        (r"^  (digits|tiny) +batch .* --freeze (none|conv) .* trained", 4),
        (r"^  float32 +batch .* images/s", 1),
        (r"^  bfloat16(, compiled)? +batch .* images/s", 2),
        (r"^  ld3 (plain|--checkpoint) +nfe  4: +[\d.]+ s per update", 2),
        (r"^  dode nfe  4: +[\d.]+ s for all \(ddim [\d.]+, ipndm", 1),
    ):
        assert len(re.findall(pattern, done.stdout, re.M)) == count, (pattern, done.stdout)
