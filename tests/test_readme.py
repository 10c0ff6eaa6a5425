"""README.md, RESULTS.md, CONTRIBUTING.md: links lead somewhere, commands exist, code runs."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.machinery.options import parse_config
from test_house import SCRIPTS

ROOT = Path(__file__).parent.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "RESULTS.md", "CONTRIBUTING.md"
)}


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_paths_lead_to_files(name):
    text = TEXTS[name]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:common|tests|notebooks)/[\w/.-]+)`", text)
    missing = [path for path in links + paths if not (ROOT / path).exists()]
    assert not missing


def commands(text):
    """[(module, arguments)] of all lines `python ...`, in code blocks and in backquotes."""
    lines = re.findall(r"^    (.+)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in lines:
        for part in line.partition("#")[0].split("&&"):
            words = [w for w in part.split() if w not in ("I64", "...")]  # RESULTS.md explains I64
            if words[:1] == ["torchrun"]:
                words = ["python", *words[2:]]
            if len(words) < 2 or words[0] != "python":
                continue
            if words[1] == "-m":
                found.append((words[2], words[3:]))
            elif words[1].endswith(".py"):
                found.append((words[1].removesuffix(".py").replace("/", "."), words[2:]))
    return found


def all_commands():
    sources = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS]
    docstrings = [ast.get_docstring(ast.parse(source)) for source in sources]
    texts = [*TEXTS.values(), *docstrings]
    return sorted({(m, tuple(a)) for text in texts for m, a in commands(text)})


ALL = all_commands()


def test_the_commands_are_found():
    assert ("ld3", ()) in ALL and ("notebooks.compare", ()) in ALL and len(ALL) >= 40
    assert ("progressive", ("--dataset", "imagenet64")) in [(m, a[:2]) for m, a in ALL]


@pytest.mark.parametrize("module,arguments", ALL, ids=lambda x: x if isinstance(x, str) else None)
def test_a_command_has_only_options_that_exist(module, arguments):
    """The flags, and the types and choices of their values."""
    if not arguments or arguments == ("--help",):
        return
    if module.startswith("notebooks."):
        sys.path.append(str(ROOT / "notebooks"))
        module = module.removeprefix("notebooks.")
    script = importlib.import_module(module)
    plain = type("Plain", (script.Config,), {"__post_init__": lambda self: None})
    parse_config(plain, getattr(script, "PRESETS", {}), "", list(arguments))


def run_in(folder, command):
    """`python COMMAND` in that folder, as a user would; what it prints."""
    script, *arguments = command.split()
    words = ["-m", *arguments] if script == "-m" else [str(ROOT / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_first_command_prints_the_table_of_the_readme(tmp_path):
    """On another machine rounding differs: the learned grid's numbers within a tenth."""
    printed = [line.split() for line in run_in(tmp_path, "ld3.py").splitlines()]
    shown = re.search(r"<!-- readme_ld3 -->(.*?)<!-- end -->", TEXTS["README.md"], re.S)[1]
    table = [line.split() for line in shown.splitlines() if line.startswith("    ")]
    table = [row for row in table if len(row) > 1 and (row[1].isdigit() or row[1] == "nfe")]
    for row in table:
        same = [line for line in printed if line[:2] == row[:2] and len(line) == len(row)]
        assert len(same) == 1, row
        if row[1] != "nfe":  # a value and, behind "±", its standard error
            numbers = [[float(x.partition("±")[0]) for x in line[1:]] for line in (row, *same)]
            torch.testing.assert_close(*map(torch.tensor, numbers), rtol=0.1, atol=3e-3)
    metrics = json.loads((tmp_path / "runs" / "ld3-digits" / "metrics.json").read_text())
    assert {row["name"] for row in metrics["results"]} <= {row[0] for row in table}


@pytest.mark.slow
def test_another_command_of_the_readme_repeats_a_kept_result(tmp_path):
    run_in(tmp_path, "ld3.py --solver dpmpp --nfe 8")
    kept = ROOT / "notebooks" / "results" / "digits-ld3-dpmpp-nfe8" / "metrics.json"
    again = tmp_path / "runs" / "ld3-digits" / "metrics.json"
    for old, new in zip(*(json.loads(path.read_text())["results"] for path in (kept, again))):
        assert old["name"] == new["name"]
        for key in ("rmse_to_teacher", "fid"):
            assert new[key] == pytest.approx(old[key], rel=0.1, abs=1e-3)


@pytest.mark.slow
def test_the_longer_commands_of_the_readme_work_one_after_the_other(tmp_path):
    """With --smoke, where that leaves away what the next one needs, with a word more."""
    more = {
        "progressive.py": "--from-steps 8",
        "progressive.py --dataset folder --data-dir my-images":
            "--teacher runs/teacher-my-images/teacher.safetensors",
    }
    (tmp_path / "my-images").mkdir()
    for k, pixels in enumerate(torch.randint(256, (24, 16, 16, 3), dtype=torch.uint8).numpy()):
        Image.fromarray(pixels).save(tmp_path / "my-images" / f"{k}.png")
    laptop, own = (
        re.search(f"{first}.*?(?={last})", TEXTS["README.md"], re.S)[0]
        for first, last in (("\\*a laptop", "one GPU"), ("\\*Images", "Teacher"))
    )
    done = []
    for module, arguments in commands(laptop + own):
        script = f"-m {module}" if "." in module else f"{module}.py"
        command = " ".join([script, *arguments])
        if command not in ("ld3.py --help", "ld3.py --solver dpmpp --nfe 8"):
            run_in(tmp_path, f"{command} {more.get(command, '')} --smoke")
            done.append(command)
    assert len(done) == 8
