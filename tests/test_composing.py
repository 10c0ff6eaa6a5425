"""notebooks/composing.py: its runs fit together, and its table says which method was best."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "notebooks"))
import composing  # noqa: E402
import tables  # noqa: E402

from common.diffusion import noise_from_seeds  # noqa: E402
from common.machinery.options import parse_config  # noqa: E402
from common.solvers import euler  # noqa: E402
from common.teacher import load_teacher  # noqa: E402


def test_every_run_is_a_command_whose_inputs_were_made_before_it():
    made = []
    for job in composing.all_jobs():
        assert job.folder not in made
        needed = [word.split("/")[1] for word in job.command.split() if word.startswith("OUT/")]
        assert set(needed) <= set(made), job.command
        made.append(job.folder)
        script, *options = job.command.split()
        assert (ROOT / script).exists()
        module = {"ld3.py": composing.ld3, "dode.py": composing.dode}.get(script)
        if module and "--schedule" not in options:
            parse_config(module.Config, module.PRESETS, "", options)  # refuses what it cannot do


def test_a_run_measures_the_learned_grid_and_the_scalars_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr(composing, "N", 32)
    command = "ld3.py --smoke --solver euler --times coupled --nfe 3"
    composing.run_job(composing.Job("ld3", "", "grid", command), tmp_path)
    command = "dode.py --solver ddim --nfe 3 --schedule OUT/grid/schedule.json"
    job = composing.Job("ld3 + d-ode", "", "both", f"{command} --fit-n 32")
    composing.run_job(job, tmp_path)

    metrics = json.loads((tmp_path / "grid/metrics.json").read_text())
    row, teacher_row = metrics["results"]
    assert (row["name"], row["fid_n"], teacher_row["rmse_to_teacher"]) == ("ld3", 32, 0)
    sigmas = json.loads((tmp_path / "grid/schedule.json").read_text())["sigmas"]
    images = torch.load(tmp_path / "teacher-images.pt")
    with torch.no_grad():
        teacher = load_teacher(None, "digits", "cpu")
        x = euler(teacher, 80 * noise_from_seeds(range(32), (1, 8, 8)), torch.tensor(sigmas))
    rmse = (x.float() - images).square().mean().sqrt().item()
    assert row["rmse_to_teacher"] == pytest.approx(rmse, rel=1e-4)

    metrics = json.loads((tmp_path / "both/metrics.json").read_text())
    found = list(composing.rows_of(job, metrics))
    assert [(row["methods"], row["variant"]) for row in found] == [("ld3 + d-ode", "d-ddim")]
    assert found[0]["rmse"] < rmse  # the scalars help on this grid


def metrics_of(**fids):
    same = {"nfe": 4, "fid_n": composing.N, "rmse_to_teacher": 0.5}
    rows = [{"name": name, "fid": fid, **same} for name, fid in fids.items()]
    return {"seed": 0, "config": {"solver": "unipc"}, "results": rows}


def test_rows_of_a_network_run_are_its_own_method_and_solvers_that_learn_nothing():
    metrics = metrics_of(ddim=2.0, pd=0.5, cfd=0.4, teacher=0.1)
    metrics["results"].append({"name": "cfd", "nfe": 4, "fid": 9.0, "fid_n": 7})  # another n
    found, variants = {}, {}
    for method in ("pd", "cfd", "cud + pd", "ld3"):
        job = composing.Job(method, "", "folder", "command")
        kept = metrics_of(edm=3.0, ld3=0.7, teacher=0.1) if method == "ld3" else metrics
        rows = list(composing.rows_of(job, kept))
        found[method] = {(row["methods"], row["fid"]): row.get("rmse") for row in rows}
        variants[method] = [row["variant"] for row in rows]
    assert found["pd"] == {("", 2.0): 0.5, ("pd", 0.5): 0.5}
    assert found["cfd"] == {("cfd", 0.4): 0.5}
    assert found["cud + pd"] == {("cud + pd", 0.5): None}  # RMSE to CUD's own trajectories
    assert found["ld3"] == {("", 3.0): 0.5, ("ld3", 0.7): 0.5}
    assert variants["ld3"] == ["unipc, edm", "unipc"] and variants["pd"] == ["ddim, cosine", ""]


def test_the_table_has_means_over_seeds_of_the_best_variant(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [
        ("", "ddim, edm", 0, 9.0), ("ld3", "ipndm", 0, 1.0), ("ld3", "ipndm", 1, 3.0),
        ("pd", "", 0, 1.5), ("d-ode", "d-ddim, edm", 0, 8.0), ("d-ode", "d-ddim, logsnr", 0, 7.0),
        ("ld3 + d-ode", "d-ipndm", 0, 1.25), ("pd + ld3", "euler, 4-step student", 0, 5.0),
    ]
    names = ("methods", "variant", "seed", "fid")
    rows = [dict(zip(names, row), nfe=4, rmse=0.25) for row in rows]
    (tmp_path / "digits-composing").mkdir()
    (tmp_path / "digits-composing/results.json").write_text(json.dumps({"results": rows}))
    lines = {}
    for line in tables.composing().splitlines()[2:]:
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        lines[label] = dict(zip(tables.COMPOSED_NFE, cells))
    assert lines["LD3, ipndm"][4] == "2.00 ± 1.41 (0.250)"
    assert lines["D-ODE, euler"] == {**dict.fromkeys(tables.COMPOSED_NFE, ""), 4: "7.00 (0.250)"}
    assert lines["**best of one**"][4] == "1.50, PD"
    assert lines["**best of two**"][4] == "1.25, LD3 + D-ODE"
