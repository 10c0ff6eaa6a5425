"""Every notebook runs from top to bottom, and shows what it says."""

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


@pytest.mark.slow
def test_ld3_notebook():
    found = re.findall(r"^(\w+) +RMSE ([\d.]+)", execute("ld3.ipynb"), re.M)
    rmse = {name: float(value) for name, value in found}
    assert rmse.pop("learned") < 0.5 * min(rmse.values())


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
