"""Every notebook runs from top to bottom, and shows what it says."""
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def execute(name):
    """Run a notebook in its folder; return what it printed."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return "".join(output["text"] for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout")


@pytest.mark.slow
def test_ld3_notebook():
    printed = execute("ld3.ipynb")
    rmse = {name: float(value) for name, value in re.findall(r"^(\w+) +RMSE ([\d.]+)", printed, re.M)}
    assert rmse.pop("learned") < 0.5 * min(rmse.values())


@pytest.mark.slow
def test_progressive_notebook():
    printed = execute("progressive.ipynb")
    share = {(name, int(n)): float(value) for name, n, value in re.findall(r"^(\w+) +(\d+) steps: ([\d.]+) of", printed, re.M)}
    assert all(share["pd", n] > share["ddim", n] for n in (8, 4, 2, 1)) and share["pd", 1] > 0.7 > 0.1 > share["ddim", 1]
    rmse = {name: float(value) for name, value in re.findall(r"^(\w+, \d) +RMSE to four steps ([\d.]+)", printed, re.M)}
    assert rmse["pd, 2"] < 0.7 * rmse["ddim, 2"] and rmse["pd, 1"] < 0.5 * rmse["ddim, 1"]
