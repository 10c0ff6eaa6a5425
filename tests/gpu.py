"""A quarter of an hour on a GPU: what works there, and how fast. One command, one table.

    python tests/gpu.py                                # 4 minutes: what works
    python tests/gpu.py teacher --data-dir DIR         # 5 minutes: CIFAR-10's small teacher
    python tests/gpu.py bench                          # 5 minutes: steps and fits at full size
    python tests/gpu.py works --device cpu             # the same commands without a GPU

`works`: every script's --smoke, then `ld3.py` and `dode.py` on digits, whose rows are compared
with those kept in notebooks/results, made on a CPU. `teacher`: trains from where its checkpoint
in --out stands, until --minutes are over, then saves as Ctrl-C does. `bench`: tests/bench.py.
Each command's output is a file in --out; a command that fails does not stop the next.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("ld3", "dode", "progressive", "cfd", "cud", "distributional")


def run(name, command, out, minutes=10):
    """Run `python COMMAND` until it ends or its minutes are over; return its line of the table."""
    start = time.perf_counter()
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # a training saves and ends with 130
            code = process.wait(60)
    row = {"name": name, "exit code": code, "seconds": round(time.perf_counter() - start, 1)}
    print(f"{name:24s} exit code {code:3d} {row['seconds']:8.1f} s", flush=True)
    return row


def rows_of(path):
    rows = json.loads(path.read_text())["results"]
    return {(row["name"], row["nfe"]): row for row in rows}


def difference(here, kept):
    """The largest relative difference of RMSE and FID between two runs' rows, and its row."""
    ours, theirs = rows_of(here), rows_of(kept)
    found = [
        (abs(ours[key][column] / theirs[key][column] - 1), *key, column)
        for key in ours.keys() & theirs.keys()
        for column in ("rmse_to_teacher", "fid")
        if theirs[key].get(column)
    ]
    return max(found, default=None)


def works(config):
    """Every script in seconds; then two whole runs and how far their rows are from a CPU's."""
    device, rows = ["--device", config.device], []
    for script in SCRIPTS:
        folder = str(config.out / f"smoke-{script}")
        command = [f"{script}.py", "--smoke", *device, "--out", folder]
        rows.append(run(f"smoke-{script}", command, config.out))
    for script, kept in (("ld3", config.ld3), ("dode", config.dode)):
        folder = config.out / f"{script}-digits"
        rows.append(run(f"{script}-digits", [f"{script}.py", *device, "--out", folder], config.out))
        if (folder / "metrics.json").exists():
            rows[-1]["difference"] = difference(folder / "metrics.json", Path(kept))
            print(f"  largest difference from {kept}: {rows[-1]['difference']}")
    return rows


def teacher(config):
    folder = config.out / "teacher-cifar10"
    command = ["-m", "common.teacher", "--dataset", "cifar10", "--device", config.device]
    command += ["--out", str(folder), "--save", str(folder / "teacher.safetensors"), "--compile"]
    if config.data_dir:
        command += ["--data-dir", config.data_dir]
    if (folder / "checkpoint.pt").exists():
        command.append("--resume")
    return [run("teacher-cifar10", command, config.out, config.minutes)]


def bench(config):
    return [run("bench", ["tests/bench.py", "step", "fit"], config.out, config.minutes)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = "notebooks/results"
    parser.add_argument("blocks", nargs="*", default=["works"], help="works, teacher, bench")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data-dir", help="CIFAR-10, where it is not to be downloaded")
    parser.add_argument("--minutes", type=float, default=5, help="of teacher and of bench")
    parser.add_argument("--ld3", default=f"{results}/digits-ld3-seed0/metrics.json")
    parser.add_argument("--dode", default=f"{results}/digits-dode-seed0/metrics.json")
    config = parser.parse_args()
    config.out = config.out.resolve()
    config.out.mkdir(parents=True, exist_ok=True)
    rows = [row for block in config.blocks for row in globals()[block](config)]
    (config.out / "gpu.json").write_text(json.dumps(rows, indent=1))
    sys.exit(any(row["exit code"] not in (0, 130) for row in rows))


if __name__ == "__main__":
    main()
