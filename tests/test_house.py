"""The house: what imports what, on which systems, and how wide the text is."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("ld3", "dode", "progressive", "cfd", "cud", "distributional")
MATHEMATICS = ("diffusion", "solvers", "unet")
LIMITS = {"common": 1950, "common/machinery": 1750}  # lines of code in all
NO_CODE = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")
SOURCES = [ROOT / f"{name}.py" for name in SCRIPTS] + sorted((ROOT / "common").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path):
    """Modules of this project that a file imports anywhere, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = parts & MODULES.keys()
            found |= modules
            if modules != parts:  # some are names of the module itself
                found.add(node.module)
    return found & MODULES.keys()


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def reached(name):
    """What is imported, directly or by what is imported."""
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*(IMPORTS[n] for n in new)) - found
    return found - {name}


def test_the_imports_are_found():
    assert {"common.diffusion", "common.machinery.run"} <= IMPORTS["common.teacher"]
    assert IMPORTS["common.machinery.run"] >= {"common", "common.machinery.ranks"}
    assert len(MODULES) >= 20


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_mathematics_imports_no_machinery(name):
    allowed = {"common", *(f"common.{other}" for other in MATHEMATICS)}
    assert reached(f"common.{name}") <= allowed


def test_imports_go_from_the_top_down():
    """machinery < datasets < classifier < fid < teacher < root scripts; no cycles."""
    layers = ["common.datasets", "common.classifier", "common.fid", "common.teacher"]
    for name in MODULES:
        below = reached(name)
        assert not any(name in reached(other) for other in below), f"{name}: a cycle"
        if name.startswith("common.machinery"):
            assert not below & set(layers), name
        if name in layers:
            assert not below & set(layers[layers.index(name) + 1 :]), name
        if name.startswith("common"):
            assert not below & set(SCRIPTS), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_root_script_imports_another(name):
    assert not reached(name) & set(SCRIPTS)


def packages(tree):
    """Names of the packages that the import statements among these nodes import."""
    found = set()
    for node in tree:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_root_script_imports_common_torch_numpy_and_the_standard_library(name):
    """And within functions, where they are needed, the packages that bring pretrained networks."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    allowed = {"common", "torch", "numpy", *sys.stdlib_module_names}
    assert packages(tree.body) <= allowed
    assert packages(ast.walk(tree)) <= allowed | {"torchvision", "lpips"}


HIDDEN = """
import importlib, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
import filelock
for name in sys.argv[1:]:
    importlib.import_module(name)
from common.machinery.run import peak_memory_mb
import torch
assert peak_memory_mb(torch.device("cpu")) is None
"""


def test_everything_imports_without_fcntl_and_resource():
    """Windows has neither."""
    command = [sys.executable, "-c", HIDDEN, *MODULES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.name)
def test_no_line_is_wider_than_100_columns(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    wide = [number for number, line in lines if len(line) > 100]
    assert not wide, f"{path.name}: lines {wide}"


def code_lines(text):
    """Lines that are not blank, not a comment and not part of a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose, code = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def test_lines_of_code_are_counted():
    text = '"""Two\nlines."""\n\n# a comment\nx = [\n    1,  # one\n]\ny = """a\nb"""\n'
    assert code_lines(text) == 5


@pytest.mark.parametrize("folder", LIMITS)
def test_what_the_scripts_share_is_short(folder):
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py")]
    assert sum(map(code_lines, texts)) <= LIMITS[folder]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_root_script_is_short(name):
    """At most 250 lines of code, nine lines in ten within 90 columns, 45 lines of docstring."""
    text = MODULES[name].read_text(encoding="utf-8")
    widths = sorted(map(len, text.splitlines()))
    assert code_lines(text) <= 250
    assert widths[int(0.9 * (len(widths) - 1))] <= 90
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    assert len(docstring.splitlines()) <= 45
