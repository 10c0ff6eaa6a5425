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
    printed = execute("3_progressive.ipynb")
    found = re.findall(r"^(\w+) +(\d+) steps: ([\d.]+) of", printed, re.M)
    share = {(name, int(n)): float(value) for name, n, value in found}
    assert all(share["pd", n] > share["ddim", n] for n in (8, 4, 2, 1))
    assert share["pd", 1] > 0.7 > 0.1 > share["ddim", 1]
    one, four = re.findall(r"^(?:one step|its 4 steps) .* (\d\S*e[+-]\d+)", printed, re.M)
    assert float(one) < 1e-12 and float(four) < 1e-10
    error = dict(re.findall(r"^(\w+) *: an error of 0.01 .* is ([\d.]+) in x0_hat", printed, re.M))
    assert float(error["eps"]) == 0.8 and float(error["v"]) == 0.01
    found = re.findall(r"^(\w+, \d) +RMSE to four steps of the teacher ([\d.]+)", printed, re.M)
    rmse = {name: float(value) for name, value in found}
    assert rmse["PD, 2"] < 0.8 * rmse["DDIM, 2"] and rmse["PD, 1"] < 0.5 * rmse["DDIM, 1"]


@pytest.mark.slow
def test_cfd_notebook():
    printed = execute("4_cfd.ipynb")
    sizes = re.findall(r"gradient at the target / tau: (\S+)", printed)
    assert len(sizes) == 3 and max(map(float, sizes)) < 1e-12
    pattern = r"^tau +([\d.]+): entropy .* ([\d.]+) at 2.4 .* real images ([\d.]+)"
    entropy = {tau: (float(a), float(real)) for tau, a, real in re.findall(pattern, printed, re.M)}
    assert entropy["1"][0] > entropy["0.95"][0] > entropy["0.9"][0] > entropy["1"][1]
    found = re.findall(r"^(\w+).* PD's loss ([\d.]+)  CFD's loss ([\d.]+)", printed, re.M)
    assert {pd for _, pd, _ in found} == {"0.040"}
    kl = {name: float(value) for name, _, value in found}
    assert min(kl["blur"], kl["less"]) > 3 * kl["noise"]
    found = re.findall(r"^(.+?) +entropy +([\d.-]+)  diversity +([\d.-]+)$", printed, re.M)
    terms = {name: (float(a), float(b)) for name, a, b in found}
    assert terms["each image of another class"] == (0, -2.3)
    assert terms["all images of one class"] == (0, 0)
    assert terms["no image of any class"] == (2.3, -2.3)
    assert terms["real digits"][0] < terms["targets, sigma 80"][0]
    assert terms["real digits"][1] < terms["targets, sigma 80"][1]
    pattern = r"^(\w+) +(\d) evaluations: FID ([\d.]+), unseen ([\d.]+) .* RMSE ([\d.]+)"
    found = re.findall(pattern, printed, re.M)
    rows = {(name, int(n)): [*map(float, values)] for name, n, *values in found}
    for n in (2, 1):
        ddim, pd, cfd = (rows[name, n] for name in ("ddim", "pd", "cfd"))
        assert max(pd[0], cfd[0]) < ddim[0] / 3 and max(pd[1], cfd[1]) < ddim[1] / 3
        assert pd[2] < cfd[2] < ddim[2]


@pytest.mark.slow
def test_cud_notebook():
    printed = execute("5_cud.ipynb")
    found = re.findall(r"^exact flow, .* flow term ([\d.]+), catch-up term ([\d.]+)", printed, re.M)
    (flow, long), (same, short) = [map(float, terms) for terms in found]
    assert flow == same > 10 * long > 100 * short
    pattern = r"^toy (.+?) +straightness ([\d.]+), sliced distance of 4-step samples ([\d.]+)"
    toys = {name: (float(a), float(b)) for name, a, b in re.findall(pattern, printed, re.M)}
    order = [toys[name] for name in ("cud, h to 1/4", "cud", "rectified flow")]
    assert all(large < small < flow for large, small, flow in zip(*order))
    found = re.findall(r"^([\w-]+), (\d) evaluations: FID ([\d.]+)", printed, re.M)
    fid = {(name, int(n)): float(value) for name, n, value in found}
    assert all(fid["cud", n] < 0.95 * fid["rectified-flow", n] for n in (2, 4))
    found = re.findall(r"^([\w-]+) +straightness ([\d.]+)", printed, re.M)
    assert {name for name, _ in found} == {
        *("cud", "rectified-flow", "rectified-flow-equal-compute")
    }
    assert all(0.05 < float(value) < 0.5 for _, value in found)


@pytest.mark.slow
def test_distributional_notebook():
    printed = execute("6_distributional.ipynb")
    number = r"([\d.]+)"
    found = re.findall(rf"^step +(\d+): {number} .* in a blob, (\d) blobs", printed, re.M)
    share = {int(i): (float(value), int(blobs)) for i, value, blobs in found}
    assert share[0] == (0, 0) and share[1000][0] > 0.5 and share[1000][1] >= 5
    pattern = rf"(enc|dec): change {number} at the four highest levels, {number} in the middle"
    changes = re.findall(pattern, printed)
    assert [part for part, *_ in changes] == ["enc", "dec"]
    assert all(float(ends) < 0.4 * float(middle) for _, ends, middle in changes)
    kept = [int(share) for share in re.findall(r"^--freeze .* \((\d+) %\)", printed, re.M)]
    assert kept == [0, 79, 84, 88]
    found = re.findall(rf"^(.+, \d+) evaluations: FID {number}", printed, re.M)
    fid = {name: float(value) for name, value in found}
    assert fid["gdd-i, 1"] < 0.2 * fid["before training, 1"]
    assert fid["ddim, 10"] < fid["ddim, 5"]


@pytest.mark.slow
def test_your_method_notebook():
    printed = execute("8_your_method.ipynb")
    error = {}
    for n, *both in re.findall(r"^ *(\d+) steps: error (\S+) \(Euler\), (\S+) \(", printed, re.M):
        error[int(n)] = [float(value) for value in both]
    for method, order in (0, 1), (1, 2):
        ratios = [error[n][method] / error[2 * n][method] for n in (10, 20, 40)]
        assert all(abs(ratio / 2**order - 1) < 0.05 for ratio in ratios)
    pattern = r"^\d steps: RMSE (\S+) \(Euler\), (\S+) \(.+\), (\S+) \(learned"
    toys = [tuple(map(float, found)) for found in re.findall(pattern, printed, re.M)]
    assert len(toys) == 3 and all(ours < quarter < plain for plain, quarter, ours in toys)
    rows = re.findall(r"^(ddim|shift) +5 +(\S+) +(\S+)$", printed, re.M)
    rmse, fid = ({name: float(row[i]) for name, *row in rows} for i in (0, 1))
    assert rmse["shift"] < 0.95 * rmse["ddim"] and fid["shift"] < 0.9 * fid["ddim"]


@pytest.mark.slow
def test_compare_notebook():
    printed = execute("7_compare.ipynb")
    pattern = r"^(.+), 4 evaluations: FID ([\d.]+), kept ([\d.]+)"
    again = {name: (float(a), float(b)) for name, a, b in re.findall(pattern, printed, re.M)}
    ours, kept = again["D-ODE (DDIM)"]  # a closed form: nothing to shorten
    assert abs(ours - kept) < 0.01 * kept
    ours, kept = again["LD3 (UniPC-3)"]  # 50 of 175 updates
    assert kept / 1.5 < ours < 1.5 * kept
    pattern = r"^([\w -]+?)(?: \(.+\))?: \d evaluations; pays from ([\d,]+)"
    paid = dict(re.findall(pattern, printed, re.M))
    assert int(paid["LD3"].replace(",", "")) < int(paid["PD"].replace(",", ""))
    assert "GDD-I: never reaches that FID" in printed
