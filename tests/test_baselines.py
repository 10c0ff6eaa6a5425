"""common/baselines.py: the row "best without training" is what its name says."""
import json
import sys
from pathlib import Path

import pytest
import torch
from scripts import run_script
from toy import Recorder, five_blobs

import common.baselines as baselines
from common.baselines import best_untrained, solver_name, untrained_sampler
from common.datasets import ASSETS
from common.diffusion import GRIDS, noise_from_seeds, sigma_grid
from common.solvers import ORDERS, SOLVERS, steps_for

sys.path.append(str(Path(__file__).parent.parent / "notebooks"))
import grid_table  # noqa: E402

TABLE = json.loads((ASSETS / "untrained.json").read_text())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_row_is_the_sampler_that_it_names(solver, grid, monkeypatch):
    noise, labels = noise_from_seeds(range(3), (1, 2, 2)), torch.tensor([2, 0, 1])
    for order in ORDERS[solver]:
        row = {"solver": solver, "order": order, "grid": grid}
        monkeypatch.setattr(baselines, "_measured", lambda row=row: {"digits": {"4": row}})
        teacher = five_blobs(0.3, Recorder)
        name, sampler = untrained_sampler(teacher, "digits", 4, 0.01, 40.0)
        got, levels = sampler(noise, labels), teacher.levels
        assert name == f"untrained ({solver_name(solver, order)}, {grid})"
        assert len(levels) == 4 and levels[0] == 40.0
        assert all(used is labels for used in teacher.labels)
        sigmas = sigma_grid(grid, steps_for(solver, 4), 0.01, 40.0)
        plain = five_blobs(0.3, Recorder)
        expected = SOLVERS[solver](plain, 40.0 * noise, sigmas, order=order)
        assert torch.equal(got, expected) and levels == plain.levels


def test_names():
    assert solver_name("unipc", 3) == "unipc3" and solver_name("heun", 2) == "heun"
    assert solver_name("dpm2", 2) == "dpm2" and solver_name("euler", 1) == "euler"


def test_a_set_that_was_not_measured_says_so(capsys):
    baselines.say_once.cache_clear()
    assert best_untrained("folder", 4) == ("unipc", 3, "cosine")
    for _ in range(2):
        name, sampler = untrained_sampler(five_blobs(0.3, Recorder), "folder", 4)
    assert name == "untrained (unipc3, cosine)"
    assert sampler(noise_from_seeds(range(2), (1, 2, 2)), None).shape == (2, 1, 2, 2)
    assert capsys.readouterr().out.count("not measured on folder with 4 evaluations") == 1


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])
def test_every_hand_made_grid_is_in_the_kept_table(dataset):
    """With UniPC at five counts, and untrained.json is what the table says."""
    table = json.loads((grid_table.RESULTS / f"{dataset}-grids" / "metrics.json").read_text())
    found = {}
    for row in table["results"]:
        if row["name"] != "fine":
            name = f"{solver_name(row['solver'], row['order'])}, {row['grid']}"
            assert row["name"] == name and row["fid_n"] >= 512
            found.setdefault(row["nfe"], set()).add(name)
    for nfe in (2, 3, 4, 5, 8):
        assert {f"unipc3, {grid}" for grid in GRIDS} <= found[nfe], f"{nfe} evaluations"
    assert TABLE[dataset] == grid_table.best_rows(table["results"])
    for nfe, best in TABLE[dataset].items():
        fids = [row["fid"] for row in table["results"] if str(row["nfe"]) == nfe]
        assert best["fid"] == min(fids)


def test_a_cell_of_the_table_is_what_its_name_says():
    """The solver and grid of its name, though equal evaluations are made once."""
    noise = noise_from_seeds(range(3), (1, 2, 2))
    shared, asked = grid_table.Remembering(five_blobs(0.3, Recorder)), 0
    for nfe, grid in ((1, "edm"), (4, "vp"), (3, "cosine")):
        cells = grid_table.samplers_of(shared, grid_table.MOST, grid, nfe)
        names = [name for (name, _) in cells]
        expected = {1: ["euler, edm"], 3: [f"{n}, {grid}" for n in grid_table.MOST if n not in (
            "heun", "dpm2")]}.get(nfe, [f"{n}, {grid}" for n in grid_table.MOST])
        assert names == expected
        for (name, _), sampler in cells.items():
            solver, order = grid_table.NAMES[name.split(",")[0]]
            plain = five_blobs(0.3, Recorder)
            sigmas = sigma_grid(grid, steps_for(solver, nfe))
            got = SOLVERS[solver](plain, 80.0 * noise, sigmas, order=order)
            assert torch.equal(sampler(noise, None), got) and len(plain.levels) == nfe
            asked += nfe
        shared.forget()
    assert shared.teacher.levels.count(80.0) == 1 and len(shared.teacher.levels) < 0.7 * asked


def test_a_table_goes_on_and_keeps_its_best(tmp_path, monkeypatch):
    """A second run measures the missing cells alone; --keep writes what the scripts read."""
    monkeypatch.setattr(grid_table, "RESULTS", tmp_path)
    monkeypatch.setattr(grid_table, "ASSETS", tmp_path)
    measure, seen = grid_table.measure, []

    def counted(run, samplers, *arguments, **options):
        seen.extend(samplers)
        return measure(run, samplers, *arguments, **options)

    monkeypatch.setattr(grid_table, "measure", counted)
    command = ("--smoke", "--nfe", 2, "--solver", "unipc3", "--out", tmp_path / "run", "--grid")
    run_script(grid_table, monkeypatch, *command, "edm")
    run_script(grid_table, monkeypatch, *command, "edm", "cosine", "--keep")
    assert [k for k in seen if k[0] != "fine"] == [("unipc3, edm", 2), ("unipc3, cosine", 2)]
    kept = json.loads((tmp_path / "digits-grids" / "metrics.json").read_text())["results"]
    rows = {row["name"]: row for row in kept}
    assert rows.keys() == {"fine", "unipc3, edm", "unipc3, cosine"}
    best = min((rows["unipc3, edm"], rows["unipc3, cosine"]), key=lambda row: row["fid"])
    found = json.loads((tmp_path / "untrained.json").read_text())["digits"]
    assert found.keys() == {"2"} and found["2"] == {k: best[k] for k in found["2"]}


def test_a_network_without_a_teacher_is_compared_with_the_shipped_one_where_that_is_fair():
    for dataset, device, classes, count in (
        ("digits", "cpu", 0, 1), ("folder", "cpu", 0, 0), ("imagenet64", "cuda", 1000, 0),
        ("cifar10", "cpu", 10, 1), ("cifar10", "cpu", 0, 0), ("cifar10", "cuda", 10, 0),
    ):
        found = baselines.untrained_samplers(dataset, (4,), device, classes)
        assert len(found) == count, (dataset, device, classes)


def test_every_measured_choice_can_be_made():
    for dataset, counts in TABLE.items():
        for nfe, row in counts.items():
            assert best_untrained(dataset, int(nfe)) == (row["solver"], row["order"], row["grid"])
            teacher = five_blobs(0.3, Recorder)
            noise = noise_from_seeds(range(2), (1, 2, 2))
            untrained_sampler(teacher, dataset, int(nfe))[1](noise, None)
            assert len(teacher.levels) == int(nfe)
