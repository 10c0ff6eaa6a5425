"""common/machinery/options.py: flags, presets, ranges, and errors of one line."""

import dataclasses
import importlib
import io
import re
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_house import SCRIPTS

from common import UsageError
from common.machinery import options as machinery
from common.machinery.options import (
    Options, TrainingOptions, cli, complete, option, parse_config, preset_name,
)

sys.path.append(str(Path(__file__).parent.parent / "notebooks"))


@dataclass
class Config:
    dataset: str = option("digits", "data set", choices=("digits", "mnist"))
    data_dir: str | None = option(None, "folder")
    seed: int = option(0, "seed")
    device: str = option("cpu", "device")
    out: str | None = option(None, "folder of the run")
    resume: bool = option(False, "go on")
    smoke: bool = option(False, "seconds")
    augment: bool = option(True, "flip images")
    labels: bool | None = option(None, "conditional")
    lr: float | None = option(None, "rate, 50% of it by default")
    widths: tuple[int, ...] = option((16, 32), "channels")
    levels: tuple[float, ...] | None = option(None, "noise levels")


PRESETS = {
    "digits": {"lr": 0.1, "levels": (2.0, 1.0), "labels": False},
    "mnist": {"lr": 0.2, "levels": (3.0,), "labels": True},
}
SMOKE = {"lr": 0.5}


def parse(*argv):
    return parse_config(Config, PRESETS, "A method.", list(argv))


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------ the command line


def test_flags_that_are_not_given_keep_their_defaults():
    assert parse() == Config()
    assert parse("--seed", "7") == Config(seed=7)


def test_flags_have_the_types_of_their_fields():
    line = "--data-dir /data --lr 3e-4 --no-augment --smoke --widths 8 16 24 --levels 5 0.5"
    config = parse(*line.split())
    assert config == Config(
        data_dir="/data", lr=3e-4, augment=False, smoke=True, widths=(8, 16, 24), levels=(5.0, 0.5)
    )
    # As the default is: or --resume would take it for another option.
    assert type(config.widths) is type(config.levels) is tuple
    assert type(config.levels[0]) is float and parse("--levels", "2").levels == (2.0,)
    assert parse("--labels").labels is True
    assert parse("--no-labels").labels is False
    assert parse("--augment").augment is True


@pytest.mark.parametrize(
    "argv, pattern",
    [
        (["--sede", "1"], "unrecognized arguments: --sede"),
        (["--see", "1"], "unrecognized arguments: --see"),  # no abbreviations
        (["--seed", "one"], "--seed: invalid int value: 'one'"),
        (["--seed"], "--seed: expected one argument"),
        (["--lr", "1,5"], "--lr: invalid float value"),
        (["--dataset", "cifar"], "--dataset: invalid choice: 'cifar' .*digits.*mnist"),
        (["--widths"], "--widths: expected at least one argument"),
        (["--widths", "8", "x"], "--widths: invalid int value: 'x'"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_flags_are_one_line(argv, pattern, capsys):
    with pytest.raises(UsageError, match=pattern) as error:
        parse(*argv)
    one_line(error)
    assert capsys.readouterr() == ("", "")  # no usage text of argparse in front of it


@pytest.mark.parametrize("script", [*SCRIPTS, "common.teacher", "common.classifier"])
def test_the_help_of_a_script_fits_its_first_screen(script, capsys):
    module = importlib.import_module(script)
    presets, screens = getattr(module, "PRESETS", {}), []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            parse_config(module.Config, presets, module.__doc__, [flag])
        assert stop.value.code == 0
        screens.append(capsys.readouterr().out)
    first, everything = screens
    assert len(first.splitlines()) <= 32
    assert all(len(line) <= 100 for line in first.splitlines())
    assert "--dataset" in first and f"python {script}.py" * (script in SCRIPTS) in first
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')}" in everything


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UsageError("--nfe 0: at least 1"), 2, "prog.py: error: --nfe 0: at least 1\n"),
        (UsageError("a\x1b[2Jb\nc"), 2, "prog.py: error: a?[2Jb c\n"),  # words of a file
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_cli_turns_errors_into_one_line_and_an_exit_code(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/prog.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli(main)
    assert stop.value.code == code and capsys.readouterr() == ("", line)


def test_cli_hides_no_fault_of_ours(capsys):
    with pytest.raises(ZeroDivisionError):
        cli(lambda: 1 / 0)
    seen = []
    assert cli(lambda: seen.append(cli.running)) is None
    assert seen == [True] and not cli.running  # what calls main() later is no program of ours


# ---------------------------------------------------------------------- presets and ranges


def test_presets_fill_what_is_none_and_nothing_else():
    config = parse("--dataset", "mnist", "--no-labels")
    complete(config, PRESETS, SMOKE)
    assert (config.lr, config.levels, config.labels, config.data_dir) == (0.2, (3.0,), False, None)
    config = parse("--smoke")
    complete(config, PRESETS, SMOKE)
    assert (config.lr, config.levels) == (0.5, (2.0, 1.0))
    config = parse("--smoke", "--lr", "0.3")
    complete(config, PRESETS, SMOKE)
    assert config.lr == 0.3
    with pytest.raises(UsageError, match="^--dataset imagenet: choose one of digits, mnist$"):
        complete(Config(dataset="imagenet"), PRESETS, SMOKE)


def test_the_preset_of_a_folder_follows_machine_and_images(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    both, there = {"digits": {}, "folder": {}, "folder-gpu": {}}, torch.cuda.is_available()

    def name(device, images, presets=both):
        monkeypatch.setattr(machinery, "Folder", lambda path: SimpleNamespace(names=range(images)))
        return preset_name(Config("folder", str(tmp_path), device=device), presets)

    assert name("cpu", 50_000) == "folder" and name("cuda:1", 9_999) == "folder"
    assert name("cuda:1", 10_000) == name("cuda", 50_000) == "folder-gpu"
    assert name("auto", 50_000) == ("folder-gpu" if there else "folder")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert name("auto", 50_000) == "folder-gpu" and name("auto", 300) == "folder"
    assert name("cpu", 50_000) == "folder"
    assert preset_name(Config("digits", device="cuda"), both) == "digits"
    two = {"cifar10": {}, "cifar10-gpu": {}}  # whatever the images, of which none need be there
    assert preset_name(Config("cifar10", device="cuda:1"), two) == "cifar10-gpu"
    assert preset_name(Config("cifar10", device="cpu"), two) == "cifar10"
    assert name("cuda", 50_000, {"folder": {}}) == "folder"


@pytest.mark.parametrize("script", [*SCRIPTS, "common.teacher"])
def test_a_folder_has_a_preset_for_a_laptop(script, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    module = importlib.import_module(script)
    config = module.Config(dataset="folder", data_dir=str(tmp_path), device="cpu")
    assert config.eval_n <= 1000 and config.eval_batch <= 256
    cost = {"cud": "steps", "common.teacher": "steps", "progressive": "updates", "cfd": "updates"}
    if script in cost:
        assert getattr(config, cost[script]) * config.batch_size <= 64_000
    if script == "distributional":
        assert config.features == "classifier" and config.images <= 20_000
    large = dataclasses.asdict(module.Config(dataset="cifar10", device="cuda"))
    assert config.eval_n < large["eval_n"]


@pytest.mark.parametrize("name, least, message", [
    ("eval_n", 2, "must be at least 2"), ("recall", 4, "--recall needs at least 4"),
    ("eval_batch", 1, "must be at least 1"), ("batch_per_gpu", 1, "must be at least 1"),
])  # fmt: skip
def test_too_few_images_to_measure_are_refused_at_once(name, least, message):
    def finish(count):
        options = dict(eval_n=count, recall=True) if name == "recall" else {name: count}
        complete(TrainingOptions(**options), {"digits": {}}, {})

    finish(least)
    flag = "--eval-n" if name == "recall" else "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^{flag} {least - 1}: {message}"):
        finish(least - 1)


@dataclass
class Ranges(Options):
    count: int | None = option(None, "from 1 on", low=1)
    share: float = option(0.5, "a share", low=0, high=1)
    rate: float = option(0.1, "a rate", above=0)
    momentum: float = option(0.9, "a decay", low=0, below=1)
    mode: str = option("a", "a mode", choices=("a", "b"))
    nfe: tuple[int, ...] = option((5,), "evaluations", low=1)
    solver: tuple[str, ...] = option(("x",), "solvers", choices=("x", "y"))
    mult: tuple[int, ...] = option((1, 1), "multiples", repeats=True, above=0)


def completed(presets=None, **options):
    config = Ranges(**options)
    complete(config, {"digits": presets or {}}, {})
    return config


@pytest.mark.parametrize(
    "option, right, wrong, words",
    [
        ("count", (1, 7), (0, -3), "must be at least 1"),
        ("share", (0, 0.3, 1), (1.0001, 2), "must be at most 1"),
        ("share", (0.0,), (-1e-9, float("nan")), "must be at least 0"),
        ("rate", (1e-9, 5), (0, -1, float("nan")), "must be above 0"),
        ("momentum", (0, 0.999), (1, 1.5), "must be below 1"),
        ("mode", ("a", "b"), ("c",), "choose one of a, b"),
        ("nfe", ((1,), (3, 2)), ((0,), (4, 0)), "must be at least 1"),
        ("solver", (("x",), ("y", "x")), (("z",), ("x", "z")), "choose one of x, y"),
        ("mult", ((1, 2, 2),), ((2, 0),), "must be above 0"),
    ],
)
def test_a_value_out_of_its_range_is_named(option, right, wrong, words):
    for value in right:
        assert getattr(completed(**{option: value}), option) == value
    for value in wrong:
        with pytest.raises(UsageError, match=f"^--{option} .*: {re.escape(words)}$") as error:
            completed(**{option: value})
        one = value[-1] if type(value) is tuple else value
        assert one_line(error).startswith(f"--{option} {one}: ")  # the wrong one


@pytest.mark.parametrize("script", [*SCRIPTS, "common.teacher", "compare"])
def test_every_number_has_a_range(script):
    """Nanoseconds as a seed, 2^64, infinity: one line, and not what numpy or torch would say."""
    module = importlib.import_module(script)
    hints = typing.get_type_hints(module.Config)
    for field in dataclasses.fields(module.Config):
        kind, _ = machinery._kind(hints[field.name])
        values = ["-1", str(2**64)] if kind is int else ["nan", "inf", "-0.5"]
        for value in values * (kind in (int, float)):
            flag = "--" + field.name.replace("_", "-")
            with pytest.raises(UsageError, match=f"{flag} {value}(.0)?: |{flag}: ") as error:
                parse_config(module.Config, getattr(module, "PRESETS", {}), None, [flag, value])
            one_line(error)
    with pytest.raises(UsageError, match="^--seed 1764364800000000000: must be at most 2147483647"):
        parse_config(module.Config, {}, None, ["--seed", "1764364800000000000"])


def test_ranges_hold_for_presets_too():
    assert completed({"count": 2}).count == 2 and completed().count is None
    with pytest.raises(UsageError, match="^--count 0: must be at least 1$"):
        completed({"count": 0})


def test_several_values_become_a_tuple_without_repetitions():
    assert completed(nfe=5).nfe == (5,) and completed(solver="y").solver == ("y",)
    assert completed(nfe=[8, 4, 8]).nfe == (8, 4)  # the order stays
    assert completed(mult=(2, 2, 1)).mult == (2, 2, 1)  # where equal ones mean something
    assert completed({"nfe": 3}, nfe=None).nfe == (3,)


def test_a_name_that_the_terminal_lacks_is_printed_all_the_same(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii"))
    cli(lambda: print("caf\xe9 \udcff", flush=True))
    assert written.getvalue() == b"caf\\xe9 \\udcff\n"
