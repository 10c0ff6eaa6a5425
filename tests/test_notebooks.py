"""Every notebook runs from top to bottom, shows what it says, and its folded answers are right."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
NUMBER = r"([\d.]+(?:e[-+]?\d+)?)"


def answers_in(source):
    """The code of the answers that are folded into a markdown cell."""
    folded = re.findall(r"<details>.*?</details>", source, re.S)
    return re.findall(r"```python\n(.*?)```", "".join(folded), re.S)


def execute(name):
    """Run a notebook in its folder, each answer after its cell; return what it printed.

    Every answer ends in `check`, which must say "right".
    """
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            answers = answers_in(cell.source)
            cells += [nbformat.v4.new_code_cell(code, metadata={"answer": 1}) for code in answers]
    notebook.cells = cells
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()

    def printed(cell):
        outputs = [o for o in cell.get("outputs", []) if o.get("name") == "stdout"]
        return "".join(output["text"] for output in outputs)

    answers = [cell for cell in cells if cell.metadata.get("answer")]
    assert answers
    for cell in answers:
        words = re.findall(r"^(right|not yet)", printed(cell), re.M)
        assert words and set(words) == {"right"}, (cell.source, printed(cell))
    return "".join(map(printed, cells))


def values(pattern, printed):
    """{name: number or numbers} of the lines that match `pattern`, (name, number, ...)."""
    found = {}
    for name, *numbers in re.findall(pattern, printed, re.M):
        numbers = tuple(map(float, numbers))
        found[name.strip()] = numbers if len(numbers) > 1 else numbers[0]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_leads_to_its_neighbours(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    assert path.stat().st_size < 400_000
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"])
    i = NAMES.index(name)
    for neighbour in NAMES[max(0, i - 1) : i] + NAMES[i + 1 : i + 2]:
        assert f"({neighbour}.ipynb)" in first
    assert 'pip install -e ".[notebooks]"' in first
    outputs = json.dumps([cell.get("outputs", []) for cell in cells])
    assert not re.search(r"/tmp/|/work/|/home/|Traceback|stderr", outputs)
    assert any(answers_in("".join(cell["source"])) for cell in cells)


@pytest.mark.slow
def test_one_notation_notebook():
    printed = execute("0_one_notation")
    order = values(rf"^(Euler|Heun|DEIS).* order {NUMBER} +RMSE with 4", printed)
    assert order == pytest.approx({"Euler": 1, "Heun": 2, "DEIS": 3}, abs=0.1)
    difference = values(rf"^(.+): largest difference {NUMBER}$", printed)
    assert difference.pop("closed form against the weighted mean") < 0.02  # 200,000 draws
    differences = [value for name, value in difference.items() if "right" not in name]
    assert len(differences) == 4 and max(differences) < 1e-7
    back = re.findall(r"back to x0: difference (\S+)", printed)
    assert len(back) == 4 and max(map(float, back)) < 1e-12
    six = values(rf"^([\w-]+) +\d+ evaluations: sliced distance {NUMBER}, .* {NUMBER}$", printed)
    assert len(six) == 8 and six["LD3"][1] < 0.2 * six["DDIM"][1]
    assert six["GDD"][0] < 0.5 * six["DDIM"][0] and six["GDD"][1] > 5 * six["DDIM"][1]
    wrong = values(rf"^sigma +{NUMBER}: the network is {NUMBER} from D, D is {NUMBER}", printed)
    assert max(wrong, key=wrong.get) != "0.20" or wrong["0.20"][0] < 0.5 * wrong["0.20"][1]


@pytest.mark.slow
def test_ld3_notebook():
    printed = execute("1_ld3")
    toy = values(rf"^toy (\w+) +RMSE {NUMBER} +sigmas", printed)
    hand_made = "uniform", "quadratic", "logsnr", "edm", "cosine", "vp"
    assert toy["coupled"] < min(toy[name] for name in hand_made)
    assert toy["learned"] < 0.3 * toy["coupled"]
    digits = values(rf"^digits (\w+) +RMSE {NUMBER}", printed)
    assert digits["learned"] < 1.05 * min(digits[name] for name in hand_made)
    lowest, = re.findall(r"the lowest loss is ([\d.]+)", printed)
    loss = values(rf"^ld3.train, (\w+): loss {NUMBER}", printed)
    assert loss["coupled"] == pytest.approx(float(lowest), rel=0.02)
    assert loss["decoupled"] < 0.5 * loss["coupled"]
    slopes = re.search(r"(\S+) by backpropagation, (\S+) by differences", printed).groups()
    assert float(slopes[0]) == pytest.approx(float(slopes[1]), rel=0.01) != 0
    radius = values(rf"^toy (.+), r .*: RMSE {NUMBER}", printed)
    assert radius["hard, factor 0.001"] == radius["soft, factor 0.001"]
    assert radius["soft, factor 1"] != radius["soft, factor 0.001"]


@pytest.mark.slow
def test_dode_notebook():
    printed = execute("2_dode")
    pattern = r"lambda (\S+), best of 4,001 values (\S+); .* (\S+) -> (\S+)$"
    fits = re.findall(pattern, printed, re.M)
    assert len(fits) == 4
    for fitted, scanned, plain, corrected in fits:
        assert float(fitted) == pytest.approx(float(scanned), abs=0.003)
        assert float(corrected) < float(plain)
    toy = values(rf"^toy (\w+ +\w+) +RMSE {NUMBER} +d-\w+ +{NUMBER}", printed)
    worse = [name.split() for name, (before, after) in toy.items() if after > before]
    assert len(toy) == 8 and worse == [["edm", "dpm2"]]  # the text says so
    pattern = rf"^digits ([\w, -]+?) +\d+ evaluations: RMSE {NUMBER}, FID\* {NUMBER}$"
    digits = values(pattern, printed)
    for column in (0, 1):
        assert digits["d-ddim"][column] < 0.85 * digits["ddim"][column]
        assert digits["ddim"][column] < 0.85 * digits["ddim, edm grid"][column]


@pytest.mark.slow
def test_progressive_notebook():
    printed = execute("3_progressive")
    distance = values(rf"^(\w+ +\d+) steps: sliced distance {NUMBER}$", printed)
    assert all(distance[f"pd   {n}"] < distance[f"ddim {n}"] for n in (8, 4, 2, 1))
    assert distance["pd   1"] < 0.15 * distance["ddim 1"]
    one, = re.findall(r"^one step with .* ends (\S+) from", printed, re.M)
    four, = re.findall(r"^its 4 steps .* at most (\S+)$", printed, re.M)
    assert float(one) < 1e-12 and float(four) < 1e-10
    error = values(rf"^(\w+) *: an error of 0.01 .* is {NUMBER} in x0_hat", printed)
    assert error["eps"] == 0.8 and error["v"] == 0.01
    rmse = values(rf"^(\w+, \d) +RMSE to four steps of the teacher {NUMBER}", printed)
    assert rmse["PD, 2"] < 0.8 * rmse["DDIM, 2"] and rmse["PD, 1"] < 0.5 * rmse["DDIM, 1"]


@pytest.mark.slow
def test_cfd_notebook():
    printed = execute("4_cfd")
    sizes = re.findall(r"gradient at the target / tau: (\S+)", printed)
    assert len(sizes) == 3 and max(map(float, sizes)) < 1e-12
    pattern = rf"^(tau [\d.]+, \d) steps, .* mean radius {NUMBER}, .* {NUMBER}, sliced"
    radius = values(pattern, printed)
    assert radius["tau 0.95, 1"][0] == pytest.approx(radius["tau 0.95, 1"][1], rel=0.1)
    assert radius["tau 0.95, 1"][0] > 1.08 * radius["tau 1, 1"][0]
    pattern = rf"^tau +([\d.]+): .* {NUMBER} at 1  {NUMBER} at 2.4 .* {NUMBER} at 80; .* {NUMBER}"
    for at_1, at_24, at_80, _ in values(pattern, printed).values():
        assert at_1 < at_24 > at_80  # it rises to 2.4 and falls again
    kl = values(rf"^(\w+).* PD's loss {NUMBER}  CFD's loss {NUMBER}", printed)
    assert {pd for pd, _ in kl.values()} == {0.04}
    assert min(kl["blur"][1], kl["less"][1]) > 5 * kl["noise"][1]
    terms = values(r"^(.+?) +entropy +([\d.-]+)  diversity +([\d.-]+)$", printed)
    assert terms["each image of another class"] == (0, -2.3)
    assert terms["all images of one class"] == (0, 0)
    assert terms["no image of any class"] == (2.3, -2.3)
    assert all(a < b for a, b in zip(terms["real digits"], terms["targets, sigma 80"]))
    pattern = rf"^(\w+ +\d) evaluations: FID {NUMBER}, unseen {NUMBER} .* RMSE {NUMBER}"
    rows = values(pattern, printed)
    for n in (2, 1):
        ddim, pd, cfd = (rows[f"{name:5s} {n}"] for name in ("ddim", "pd", "cfd"))
        assert cfd[0] < pd[0] < ddim[0] and cfd[1] < pd[1] < ddim[1] and pd[2] < cfd[2]


@pytest.mark.slow
def test_cud_notebook():
    printed = execute("5_cud")
    found = re.findall(r"^exact flow, .* flow term ([\d.]+), catch-up term ([\d.]+)", printed, re.M)
    (flow, long), (same, short) = [map(float, terms) for terms in found]
    assert flow == same > 10 * long > 100 * short
    ends = values(rf"^(.+): ends {NUMBER} from the trajectory's end", printed)
    assert ends["catch-up target"] < ends["v(z, t)"]
    pattern = rf"^toy (.+?) +straightness {NUMBER}, .* with 4 steps {NUMBER}, .* {NUMBER}$"
    toys = values(pattern, printed)
    order = [toys[name] for name in ("rectified flow", *(f"cud, h to 1/{n}" for n in (16, 4, 3)))]
    assert all(a[0] > b[0] and a[1] > b[1] for a, b in zip(order, order[1:]))
    assert order[-1][2] > order[0][2]  # with many steps the ends have moved
    fid = {}
    for name, line in re.findall(r"^(cud|rectified-flow[\w-]*) +(1: .*)$", printed, re.M):
        fid[name] = dict(re.findall(r"(\d+): ([\d.]+)", line))
    cud = {n: float(value) for n, value in fid.pop("cud").items()}
    assert len(fid) == 2
    assert all(cud[n] < float(value) for line in fid.values() for n, value in line.items())
    digits = values(rf"^digits (\S+) +straightness {NUMBER}$", printed)
    assert len(digits) == 3 and digits["cud"] > 0.97 * min(digits.values())  # not straighter


@pytest.mark.slow
def test_distributional_notebook():
    printed = execute("6_distributional")
    pattern = rf"^(\w+.* weights +step +\d+): {NUMBER} of .* {NUMBER} of 8 reached, .* {NUMBER}$"
    share = values(pattern, printed)
    for start in ("teacher's weights", "random weights   "):
        early, late = share[f"{start} step  20"], share[f"{start} step 800"]
        assert late[0] > 0.9 and late[1] == 8 > early[1] and late[2] < 0.2 * early[2]
    pattern = rf"(enc|dec): change {NUMBER} at the four highest levels, {NUMBER} in the middle"
    changes = values(pattern, printed)
    assert all(ends < 0.4 * middle for ends, middle in changes.values()) and len(changes) == 2
    peaks = re.search(rf"all peaks lie between sigma {NUMBER} and {NUMBER}", printed).groups()
    assert 0.5 < float(peaks[0]) < float(peaks[1]) < 1.1  # the text's verdict
    kept = [int(share) for share in re.findall(r"^--freeze .* \((\d+) %\)", printed, re.M)]
    assert kept == [0, 79, 84, 88]
    rows = values(rf"^(.+, \d+) evaluations: FID {NUMBER} .* {NUMBER} %", printed)
    assert rows["gdd-i, 1"][0] < 0.2 * rows["before training, 1"][0]
    assert rows["ddim, 4"][0] < rows["ddim, 3"][0] < rows["ddim, 2"][0]
    assert rows["gdd, random weights, 1"][0] > 3 * rows["gdd-i, 1"][0]
    assert rows["gdd-i, 1"][1] > 1.5 * rows["ddim, 3"][1]  # speckles


@pytest.mark.slow
def test_compare_notebook():
    printed = execute("7_compare")
    again, = values(rf"^(D-ODE .*), 4 evaluations: FID {NUMBER}, kept {NUMBER}", printed).values()
    assert again[0] == pytest.approx(again[1], rel=0.01)
    pattern = r"^([\w -]+?)(?: \(.+\))?: \d evaluations; pays from ([\d,]+)"
    paid = dict(re.findall(pattern, printed, re.M))
    assert int(paid["LD3"].replace(",", "")) < int(paid["PD"].replace(",", ""))
    assert "GDD-I: never reaches that FID" in printed
    pattern = rf"^(\d) evaluations: .*network \D+ {NUMBER}, .* D-ODE {NUMBER}, .*training {NUMBER}$"
    best = values(pattern, printed)  # training pays at 1 and 2 evaluations, as the text says
    assert all((best[n][0] < best[n][2]) == (n in "12") for n in "1248")
    assert best["4"][1] < best["4"][2] and best["8"][2] < best["8"][1] < best["8"][0]
    means = dict(re.findall(r"^([\w+ -]+?) +2: .* 4: ([\d.]+) \(runs", printed, re.M))
    assert float(means.pop("PD + D-ODE")) < 0.156 < min(map(float, means.values()))
    six = values(rf"^([\w-]+) +\d+ evaluations: .* {NUMBER}, kept {NUMBER}; RMSE", printed)
    assert len(six) == 8
    assert all(now == pytest.approx(kept, abs=0.02) for now, kept in six.values())


@pytest.mark.slow
def test_your_method_notebook():
    printed = execute("8_your_method")
    error = {}
    for n, *both in re.findall(r"^ *(\d+) steps: error (\S+) \(Euler\), (\S+) \(", printed, re.M):
        error[int(n)] = [float(value) for value in both]
    for method, order in (0, 1), (1, 2):
        ratios = [error[n][method] / error[2 * n][method] for n in (10, 20, 40)]
        assert all(abs(ratio / 2**order - 1) < 0.05 for ratio in ratios)
    pattern = r"^\d steps: RMSE (\S+) \(Euler\), (\S+) \(c = .+\), (\S+) \(learned"
    toys = [tuple(map(float, found)) for found in re.findall(pattern, printed, re.M)]
    assert len(toys) == 3 and all(ours < quarter < plain for plain, quarter, ours in toys)
    rows = values(rf"^([\w, ]+?) +\d+ evaluations: RMSE {NUMBER}, FID\* {NUMBER}", printed)
    assert rows["shift"][0] < rows["ddim"][0]
    for name in ("ddim", "quarter", "shift"):  # what costs nothing is ahead, as the text says
        assert rows["ddim, cosine"][0] < rows[name][0] and rows["ddim, cosine"][1] < rows[name][1]
