"""Every notebook runs from top to bottom, and shows what it says."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def execute(name):
    """Run a notebook in its folder; return what it printed."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


@pytest.mark.parametrize("name", ["0_one_notation", "1_ld3", "2_dode"])
def test_the_numbers_of_hidden_answers_are_printed_by_the_last_cell(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    answers, = [source for source in sources if "<details>" in source]
    printed = "".join(line for output in cells[-1]["outputs"] for line in output["text"])
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    assert len(re.findall(number, answers)) > 3
    assert not set(re.findall(number, answers)) - set(re.findall(number, printed))


@pytest.mark.slow
def test_one_notation_notebook():
    printed = execute("0_one_notation.ipynb")
    found = re.findall(r"^(Euler|Heun|DEIS).* order ([\d.]+) +RMSE with 4", printed, re.M)
    order = {name: float(value) for name, value in found}
    assert order == pytest.approx({"Euler": 1, "Heun": 2, "DEIS": 3}, abs=0.1)
    found = re.findall(r"^(.+): largest difference ([\d.e-]+)$", printed, re.M)
    difference = {name: float(value) for name, value in found}
    assert difference.pop("closed form against the weighted mean") < 0.02  # 200,000 draws
    assert len(difference) == 4 and max(difference.values()) < 1e-7
    back = re.findall(r"back to x0: difference (\S+)", printed)
    assert len(back) == 4 and max(map(float, back)) < 1e-12
    found = re.findall(r"^[23]\. (\w+) (?:order )?([\d.]+)$", printed, re.M)
    answers = {name: float(value) for name, value in found}
    right = {"ipndm": 2, "deis": 4, "eps": 0.8, "v": 0.01, "velocity": 0.0099}
    assert answers == pytest.approx(right, abs=0.15) and answers["eps"] > 50 * answers["v"]


@pytest.mark.slow
def test_ld3_notebook():
    printed = execute("1_ld3.ipynb")
    rmse = {
        data: {
            name: float(value)
            for name, value in re.findall(rf"^{data} (\w+) +RMSE ([\d.]+)", printed, re.M)
        }
        for data in ("toy", "digits")
    }
    hand_made = "uniform", "quadratic", "logsnr", "edm"
    assert rmse["toy"]["coupled"] < 0.5 * min(rmse["toy"][name] for name in hand_made)
    assert rmse["toy"]["learned"] < 0.3 * rmse["toy"]["coupled"]
    assert rmse["digits"]["learned"] < 0.5 * min(rmse["digits"][name] for name in hand_made)
    lowest, = re.findall(r"the lowest loss is ([\d.]+)", printed)
    found = re.findall(r"^ld3.train, (\w+): loss ([\d.]+)", printed, re.M)
    loss = {name: float(value) for name, value in found}
    assert loss["coupled"] == pytest.approx(float(lowest), rel=0.02)
    assert loss["decoupled"] < 0.5 * loss["coupled"]
    slopes = re.search(r"(\S+) by backpropagation, (\S+) by differences", printed).groups()
    assert float(slopes[0]) == pytest.approx(float(slopes[1]), rel=0.01) != 0


@pytest.mark.slow
def test_dode_notebook():
    printed = execute("2_dode.ipynb")
    pattern = r"lambda (\S+), best of 4,001 values (\S+); .* (\S+) -> (\S+)$"
    fits = re.findall(pattern, printed, re.M)
    assert len(fits) == 4
    for fitted, scanned, plain, corrected in fits:
        assert float(fitted) == pytest.approx(float(scanned), abs=0.003)
        assert float(corrected) < float(plain)
    toy = re.findall(r"^toy (\w+) +RMSE ([\d.]+) +d-\w+ +([\d.]+)", printed, re.M)
    toy = {name: float(after) / float(before) for name, before, after in toy}
    assert toy["ddim"] < 0.5 and max(toy["ipndm"], toy["deis2"]) < 0.85
    assert toy["dpm2"] > 1  # the text says so
    found = re.findall(r"^digits (\S+) +\d+ evaluations: RMSE (\S+), FID\* (\S+)$", printed, re.M)
    digits = {name: (float(rmse), float(fid)) for name, rmse, fid in found}
    assert digits["d-ddim"][0] < 0.85 * digits["ddim"][0]
    assert digits["d-ipndm"][0] < 0.85 * digits["ipndm"][0]
    assert digits["d-ddim"][1] < 0.5 * digits["ddim"][1]
    assert "1. largest difference below 1e-12: True" in printed  # D-DDIM in noise is AB2


@pytest.mark.slow
def test_progressive_notebook():
    printed = execute("progressive.ipynb")
    found = re.findall(r"^(\w+) +(\d+) steps: ([\d.]+) of", printed, re.M)
    share = {(name, int(n)): float(value) for name, n, value in found}
    assert all(share["pd", n] > share["ddim", n] for n in (8, 4, 2, 1))
    assert share["pd", 1] > 0.7 > 0.1 > share["ddim", 1]
    found = re.findall(r"^(\w+, \d) +RMSE to four steps ([\d.]+)", printed, re.M)
    rmse = {name: float(value) for name, value in found}
    assert rmse["pd, 2"] < 0.7 * rmse["ddim, 2"] and rmse["pd, 1"] < 0.5 * rmse["ddim, 1"]


@pytest.mark.slow
def test_distributional_notebook():
    printed = execute("distributional.ipynb")
    number = r"([\d.]+)"
    pattern = rf"(enc|dec): change {number} at the four highest levels, {number} in the middle"
    changes = re.findall(pattern, printed)
    assert [part for part, *_ in changes] == ["enc", "dec"]
    assert all(float(ends) < 0.4 * float(middle) for _, ends, middle in changes)
    found = re.findall(rf"^(.+, \d+) evaluations: FID {number}", printed, re.M)
    fid = {name: float(value) for name, value in found}
    assert fid["gdd-i, 1"] < 0.2 * fid["before training, 1"]
    assert fid["ddim, 10"] < fid["ddim, 5"]


@pytest.mark.slow
def test_cud_notebook():
    printed = execute("cud.ipynb")
    pattern = r"^toy (.+?) +straightness ([\d.]+), sliced distance of 4-step samples ([\d.]+)"
    toys = {name: (float(a), float(b)) for name, a, b in re.findall(pattern, printed, re.M)}
    assert all(ours < flow for ours, flow in zip(toys["cud"], toys["rectified flow"]))
    found = re.findall(r"^([\w-]+) +straightness ([\d.]+)", printed, re.M)
    assert {name for name, _ in found} == {
        *("cud", "rectified-flow", "rectified-flow-equal-compute")
    }
    assert all(0.05 < float(value) < 0.5 for _, value in found)
