"""notebooks/tables.py and notebooks/teacher_quality.py: RESULTS.md says what the files say."""

import json
import sys
from pathlib import Path

import pytest
import torch
from scripts import run_script

from common import teacher

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "notebooks"))
import tables  # noqa: E402
import teacher_quality  # noqa: E402


@pytest.mark.parametrize("path", tables.TEXTS, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_files(path):
    text = path.read_text(encoding="utf-8")
    assert tables.fill(text) == text, "run python notebooks/tables.py"


def test_the_presets_are_what_the_text_says_of_the_shipped_teachers():
    text = " ".join((ROOT / "RESULTS.md").read_text(encoding="utf-8").split())
    for dataset in ("mnist", "cifar10"):
        preset = teacher.PRESETS[dataset]
        assert f"{preset['steps']:,} steps of {preset['batch_size']}" in text, dataset


def ld3_run(folder, seed, hand_made, learned):
    rmse = dict.fromkeys(tables.GRIDS, hand_made) | {"edm": hand_made / 2}
    rows = [{"name": name, "nfe": 5, "rmse_to_teacher": rmse[name], "fid": 4} for name in rmse]
    rows.append({"name": "ld3", "nfe": 5, "rmse_to_teacher": learned, "fid": 1 + seed})
    options = {"solver": "unipc", "nfe": 5, "optimizer": "adam", **tables.LD3_DEFAULTS}
    folder.mkdir(parents=True)
    metrics = {"config": options, "seed": seed, "results": rows}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_a_table_has_means_over_seeds_the_best_grid_and_the_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    ld3_run(tmp_path / "mnist-ld3-seed0", 0, 0.8, 0.1)
    ld3_run(tmp_path / "mnist-ld3-seed1", 1, 0.8, 0.3)
    ld3_run(tmp_path / "mnist-compare" / "ld3-5", 1, 0.8, 0.9)  # the same once more
    last = tables.ld3("mnist").splitlines()[-1]
    expected = [
        *("unipc", "5", "2", "0.400 (edm)", "0.200 ± 0.141", "0.50", "4.00 (uniform)"),
        "1.50 ± 0.707",
    ]
    assert [cell.strip() for cell in last.strip("|").split("|")] == expected


def test_what_has_no_file_is_not_run_and_each_place_gets_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.cud("mnist")
    assert "| CUD | not run | not run |" in table
    place = "<!-- mnist_cud -->\nold\n<!-- end -->"
    filled = tables.fill(f"before\n{place}\nbetween\n{place}\nafter")
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter")
    assert "old" not in filled and filled.count(table) == 2 and tables.fill(filled) == filled
    assert tables.fill("no place") == "no place"
    with pytest.raises(KeyError, match="unknown"):
        tables.fill("<!-- unknown -->\n<!-- end -->")


def test_the_nearest_image_and_the_probabilities():
    images = torch.tensor([[0, 0], [255, 255]], dtype=torch.uint8).view(2, 1, 1, 2)
    candidates = torch.tensor([[250, 200], [9, 9], [0, 90]], dtype=torch.uint8).view(3, 1, 1, 2)
    found = teacher_quality.nearest(images, candidates)
    assert found.flatten(1).tolist() == [[9, 9], [250, 200]]

    def classifier(x):  # two classes, log odds = the first pixel in [-1, 1] times 3
        return None, torch.stack([3 * x[:, 0, 0, 0], torch.zeros(len(x))], 1)

    found = teacher_quality.probabilities(classifier, images, "cpu")
    first = torch.tensor([-3.0, 3.0]).sigmoid()
    torch.testing.assert_close(found, torch.stack([first, 1 - first], 1))


@pytest.mark.slow
def test_the_quality_of_the_digits_teacher(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    run_script(teacher_quality, monkeypatch, "--dataset", "digits", "--n", 200, "--out", out)
    samples, test = json.loads((out / "quality.json").read_text())["results"]
    assert (samples["fid_n"], test["fid_n"]) == (200, 200) and (out / "nearest.png").exists()
    for row in (samples, test):
        assert row["precision"] > 0.7 and row["recall"] > 0.7 and row["confident"] > 0.8
        assert 0 < row["fid"] < 2 and abs(row["kid"]) < 0.1 > abs(row["kid_unseen"])
    assert test["own_class"] > 0.9 and "own_class" not in samples  # the teacher knows no classes
