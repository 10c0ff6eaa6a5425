"""notebooks/compare.py: which commands it runs, what trainings cost, and the table it leaves."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import run_script

import cfd
import cud
import distributional
import dode
import ld3
import progressive
from common import UsageError, unet

sys.path.append(str(Path(__file__).parent.parent / "notebooks"))
import compare  # noqa: E402

SCRIPTS = [ld3, dode, progressive, cud, distributional]


def config(tmp_path, **options):
    return compare.Config(out=str(tmp_path), **options)


def test_one_command_for_each_method_and_one_grid_for_each_count(tmp_path):
    runs = compare.commands(config(tmp_path, teacher="t.pt", seed=3))
    assert list(runs) == [
        *("ld3-2", "ld3-4", "ld3-8", "dode", "progressive", "cfd", "cud", "distributional")
    ]
    for folder, (script, *arguments) in runs.items():
        flags = dict(zip(arguments, arguments[1:]))
        assert script == folder.partition("-")[0] + ".py"
        assert (flags["--seed"], flags["--eval-n"], flags["--dataset"]) == ("3", "1024", "digits")
        assert flags.get("--teacher") == (None if folder == "cud" else "t.pt")


def test_a_run_is_read_if_it_was_made_by_the_same_command(tmp_path):
    command = ["ld3.py", "--nfe", "2"]
    assert compare.finished(tmp_path, command) is None
    made_by = {"command": "ld3.py --nfe 2 --out somewhere/else --resume"}
    (tmp_path / "metrics.json").write_text(json.dumps(made_by))
    assert compare.finished(tmp_path, command)
    assert compare.finished(tmp_path, ["ld3.py", "--nfe", "4"]) is None


def count_evaluations(monkeypatch, script, *arguments):
    """(images through the U-Nets in training, a backward pass counting as two; metrics.json)."""
    seen, forward, measure = [], unet.UNet.forward_features, script.measure

    def counting(self, x, *args, **kwargs):
        features = forward(self, x, *args, **kwargs)
        if x.device.type != "meta":  # the run's estimate of its memory computes nothing
            seen.append(len(x) * (3 if features.requires_grad else 1))
        return features

    def measuring(*args, **kwargs):
        seen.append(None)
        return measure(*args, **kwargs)

    monkeypatch.setattr(unet.UNet, "forward_features", counting)
    monkeypatch.setattr(script, "measure", measuring)
    run_script(script, monkeypatch, "--smoke", *arguments)
    monkeypatch.setattr(unet.UNet, "forward_features", forward)
    path = arguments[arguments.index("--out") + 1] / "metrics.json"
    return sum(seen[: seen.index(None)]), json.loads(path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_cost_is_what_the_training_does(script, tmp_path, monkeypatch, tiny):
    names = {name for method, name, _ in compare.SERIES.values() if method == script.__name__}
    options = {dode: [["--solver", "ddim"]]}.get(script, [[]])
    if script is ld3:
        options = [["--objective", "soft"], ["--objective", "hard"]]
    teacher = [] if script is cud else ["--teacher", tiny]
    for more in options:
        more = [*more, *teacher, "--out", tmp_path]
        counted, metrics = count_evaluations(monkeypatch, script, *more)
        rows = [row for row in metrics["results"] if row["name"] not in ("teacher", "ddim", "edm")]
        rows = [row for row in rows if row["name"] in names]
        costs = [compare.training_cost(metrics, row, {}) for row in rows]
        assert max(costs) == counted


def test_the_cost_of_cfd_has_the_part_of_pd_before_it(tmp_path, monkeypatch, tiny):
    count = partial(count_evaluations, monkeypatch)
    pd, after, teacher = tmp_path / "pd", tmp_path / "cfd", ("--teacher", tiny)
    _, pd_metrics = count(progressive, *teacher, "--updates", 3, "--out", pd)
    counted, metrics = count(cfd, *teacher, "--pd", pd, "--out", after)
    whole, metrics_alone = count(cfd, *teacher, "--out", tmp_path / "alone")
    row = {"name": "cfd", "nfe": 1}
    runs = {"progressive": pd_metrics}
    before = compare.training_cost(pd_metrics, {"nfe": 2}, runs)  # the smoke's CFD starts at 2
    assert compare.training_cost(metrics, row, runs) == before + counted
    assert compare.training_cost(metrics_alone, row, {}) == whole


ROWS = [
    {"name": "teacher", "nfe": 35, "fid": 0.1},
    {"name": "pd", "nfe": 8, "fid": 0.3912},
    {"name": "pd", "nfe": 1, "fid": 1.18},
    {"name": "untrained (ddim, cosine)", "nfe": 8, "fid": 0.18},
    {"name": "edm", "nfe": 8, "fid": 7.0},
]


def test_the_table():
    """Rows of all runs; what cost nothing with its name, from the first run that measured it."""
    later = {"results": [{"name": "untrained (heun, edm)", "nfe": n, "fid": 9.0} for n in (2, 8)]}
    runs = {"ld3-8": {"results": []}, "progressive": {"results": ROWS}, "cfd": later}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "training_cost", lambda metrics, row, runs: 10**6 / row["nfe"])
        rows = compare.collect(runs)
    assert {(row["run"], row["cost"]) for row in rows if row["label"] == "PD"} == {
        ("progressive", 125_000), ("progressive", 10**6)
    }
    lines = compare.markdown(rows).splitlines()
    assert lines[2] == "| teacher, Heun, 35 evaluations: 0.1 |  |  |  |  |  |"
    best = "| best without training |  | 9 (heun, edm) |  | 0.18 (ddim, cosine) |  |"
    assert lines[3:] == [best, "| PD | 1.18 |  |  | 0.391 | 125 k to 1,000 k |"]


def test_cfd_starts_from_progressive_and_what_was_stopped_goes_on(tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command[1:])
        out = tmp_path / command[0].stem
        out.mkdir(exist_ok=True)
        (out / "metrics.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", lambda command: run(command[1:]))
    (tmp_path / "cfd").mkdir()
    (tmp_path / "cfd" / "checkpoint.pt").touch()
    compare.run_all(config(tmp_path, methods=("cfd", "progressive")))
    first, second = commands
    assert first[-2:] == ["--out", str(tmp_path / "progressive")]
    assert second[-3:] == ["--pd", str(tmp_path / "progressive"), "--resume"]


def test_a_script_that_fails_stops_all(tmp_path, monkeypatch):
    stub = tmp_path / "ld3.py"
    stub.write_text("raise SystemExit(2)")
    monkeypatch.setattr(compare, "SCRIPTS", tmp_path)
    with pytest.raises(UsageError, match="ld3.py ended with code 2"):
        compare.run_all(config(tmp_path / "out"))


@pytest.mark.slow
def test_from_nothing_to_the_pictures_and_again_without_a_run(tmp_path, monkeypatch, capsys):
    for method in compare.METHODS:
        monkeypatch.setitem(compare.QUICK, method, ["--smoke"])
    monkeypatch.setattr(compare, "COUNTS", (1, 2))
    command = ["compare.py", "--quick", "--eval-n", "16", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    compare.main()
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"samples.png", "fid.png", "cost.png", "table.md", "compare.json"}
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert {row["label"] for row in kept["results"]} == set(compare.SERIES)
    with np.load(tmp_path / "ld3-2" / "samples.npz") as a:
        with np.load(tmp_path / "progressive" / "samples.npz") as b:  # the same noise
            gap = a["teacher, NFE 20"].astype(float) - b["teacher, NFE 35"]
            assert abs(gap).mean() < 12
    monkeypatch.setattr(compare.subprocess, "run", None)
    compare.main()
    assert json.loads((tmp_path / "compare.json").read_text()) == kept
    assert "| CUD, one step |" in capsys.readouterr().out
