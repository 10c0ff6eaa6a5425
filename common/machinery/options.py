"""Command line <-> dataclass: a field is a flag; its help, choices and range stand beside it."""
import argparse
import dataclasses
import math
import operator
import os
import sys
import typing
from functools import partial
from pathlib import Path

import torch

from common import UsageError
from common.machinery.diffusers_teachers import is_diffusers, sigma_range
from common.machinery.folders import Folder
from common.machinery.foreign import one_line
from common.machinery.ranks import leave_group

EDM_RANGE = (0.002, 80.0)  # sigma_min, sigma_max
DATASETS = ("digits", "mnist", "cifar10", "imagenet64", "folder")
MANY_IMAGES = 10_000  # from which on a GPU takes the preset "folder-gpu"
EVERYDAY = (  # the options of --help; --help-all has the others too
    "dataset", "data_dir", "teacher", "nfe", "solver", "pd", "methods", "quick", "steps", "updates",
    "images", "freeze", "batch_size", "baseline", "model_channels", "batch_per_gpu", "out",
    "resume", "smoke",
)
BOUNDS = {
    "low": ("at least", operator.ge), "high": ("at most", operator.le),
    "above": ("above", operator.gt), "below": ("below", operator.lt),
}
MOST_SEED = 2**31 - 1


def cli(main):
    """Run `main()` as a program: `UsageError` -> one line and exit code 2, Ctrl-C -> 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that an ASCII terminal lacks
    program, cli.running = f"{Path(sys.argv[0]).name}: error:", True
    try:
        main()
        leave_group()
        sys.stdout.flush()
    except UsageError as error:
        print(program, one_line(error, 1000), file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        advice = "Try a smaller --eval-batch or, if there is one, --batch-per-gpu or --checkpoint"
        print(program, str(error).splitlines()[0], advice, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # as in `| head -1`
        print_no_more()
        sys.exit(0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        cli.running = False


cli.running = False  # whether this process is a program of ours, which ends with its metrics


def print_no_more():
    """Nobody reads the output any more: let it go nowhere, also what Python writes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def option(default, help, **metadata):
    """A dataclass field that is also a flag. A default of None is filled from the presets.

    metadata: `choices`; `low`, `high` (inclusive) and `above`, `below` (exclusive) bounds of the
    value, or of each of several values; `repeats`: of these, some may be equal. Numbers without a
    lower bound must not be negative.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass
class Options:
    """The options that mean the same in every script."""

    dataset: str = option("digits", "data set: decides teacher and presets", choices=DATASETS)
    data_dir: str | None = option(None, "where the data lies (default: the cache)")
    seed: int = option(0, "of the training; images have seeds 0, 1, 2, ...", high=MOST_SEED)
    out: str | None = option(None, "folder of the run (default: runs/METHOD-DATASET)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    resume: bool = option(False, "go on from the checkpoint in --out")
    smoke: bool = option(False, "try the whole path in seconds; its numbers mean nothing")
    eval_n: int | None = option(None, "images for RMSE and FID, of seeds 0, 1, 2, ...", low=2)
    eval_batch: int | None = option(None, "images per batch while sampling", low=1)
    inception: str | None = option(None, "FID weights of Inception (default: the cache's)")
    reference: str | None = option(None, "moments: .npz, or `train` (default: EDM's, else train)")
    recall: bool = option(False, "also precision and recall: keeps the features of all images")
    fd: bool = option(False, "also fd: distance in ImageNet features of EfficientNet-Lite0")
    save_images: int | None = option(None, "write so many images of each row as PNG", low=1)

    @property
    def classifier_steps(self):
        """What shortens the training of a classifier under --smoke."""
        return 5 if self.smoke else None


@dataclasses.dataclass
class TeacherOptions(Options):
    teacher: str | None = option(None, "file, EDM .pkl or diffusers model (default: data set's)")


@dataclasses.dataclass
class SolverOptions(TeacherOptions):
    """Those of a script that learns how to sample from a teacher."""

    sigma_min: float | None = option(None, "lowest sigma (default: EDM's, or teacher's)", above=0)
    sigma_max: float | None = option(None, "highest sigma (default: EDM's, or teacher's)", above=0)


@dataclasses.dataclass
class TrainingOptions(Options):
    """Those of a script that trains a network."""

    batch_per_gpu: int | None = option(None, "images of a micro-batch (default: all)", low=1)
    checkpoint: bool = option(False, "recompute blocks backward: less memory, a third more time")
    compile: bool = option(False, "torch.compile the networks")
    precision: str = option(
        "auto", "of network passes in training; auto: the faster", choices=("auto", "fp32", "bf16")
    )


@dataclasses.dataclass
class DistillationOptions(TeacherOptions, TrainingOptions):
    """Those of a script that trains a copy of the teacher."""

    sigma_max: float | None = option(
        None, "highest noise level (default: EDM's, or teacher's)", above=1, below=math.inf
    )


def require(condition, option_name, value, message):
    """Raise `UsageError` with the option, its value and `message`, unless `condition`."""
    if not condition:
        raise UsageError(f"--{option_name.replace('_', '-')} {value}: {message}")


def preset_name(config, presets):
    """Of a data set's preset. Some have two: on a GPU "cifar10-gpu" is the paper's experiment.

    And "folder-gpu" is for many images there.
    """
    name = config.dataset
    if f"{name}-gpu" not in presets or not takes_gpu(config.device):
        return name
    if name == "folder" and len(Folder(config.data_dir).names) < MANY_IMAGES:
        return name
    return f"{name}-gpu"


def takes_gpu(device):
    """Whether `--device` ("auto", "cpu", "cuda", "cuda:1") or a torch.device means a GPU here."""
    return str(device).startswith("cuda") or device == "auto" and torch.cuda.is_available()


def complete(config, presets, smoke):
    """Fill what is None from the data set's preset (with --smoke: from `smoke` first); check it.

    A single value of a field that takes several becomes a tuple; repeated values are dropped.
    Raises UsageError.
    """
    if config.dataset not in presets:
        raise UsageError(f"--dataset {config.dataset}: choose one of {', '.join(presets)}")
    preset = presets[preset_name(config, presets)]
    for name, value in {**preset, **(smoke if config.smoke else {})}.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    teacher = getattr(config, "teacher", None)
    known = sigma_range(teacher) if teacher and is_diffusers(teacher) else EDM_RANGE
    for name, value in zip(("sigma_min", "sigma_max"), known):
        if getattr(config, name, value) is None:
            setattr(config, name, value)
    if getattr(config, "recall", False) and config.eval_n is not None:
        # every image needs three neighbours
        require(config.eval_n >= 4, "eval_n", config.eval_n, "--recall needs at least 4")
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None and _kind(hints[field.name])[1]:
            value = (value,) if isinstance(value, (int, float, str)) else tuple(value)
            value = value if "repeats" in field.metadata else tuple(dict.fromkeys(value))
            setattr(config, field.name, value)
        _check(field, value)
    if hasattr(config, "sigma_min"):
        message = f"must be below --sigma-max {config.sigma_max}"
        require(config.sigma_min < config.sigma_max, "sigma_min", config.sigma_min, message)


def _check(field, value):
    """UsageError unless a value, or each of several, is in its field's range."""
    meta = field.metadata
    for part in value if isinstance(value, (tuple, list)) else (value,):
        if part is not None and "choices" in meta:
            names = ", ".join(map(str, meta["choices"]))
            require(part in meta["choices"], field.name, part, f"choose one of {names}")
        if type(part) in (int, float):
            limits = {} if {"low", "above"} & meta.keys() else {"low": 0}
            limits |= {} if {"high", "below"} & meta.keys() else {"high": 2**40}
            for key, limit in {**meta, **limits}.items():
                if key in BOUNDS:
                    words, holds = BOUNDS[key]
                    require(holds(part, limit), field.name, part, f"must be {words} {limit}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def _kind(annotation):
    """`int | None` -> int, False; `tuple[int, ...] | None` -> int, True: there may be several."""
    parts = [a for a in typing.get_args(annotation) if a not in (type(None), Ellipsis)]
    if not parts:
        return annotation, False
    kind, several = _kind(parts[0])
    return kind, several or typing.get_origin(annotation) is tuple


def _argument(field, annotation, presets):
    """What argparse is told about a field."""
    text, default = field.metadata["help"], field.default
    if default is None and any(field.name in preset for preset in presets.values()):
        default = "by data set"
    if "(default" not in text and default not in (None, False):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{text} (default: {shown})"
    argument = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    kind, several = _kind(annotation)
    if kind is bool:
        plain = field.default is False
        return argument | {"action": "store_true" if plain else argparse.BooleanOptionalAction}
    choices = field.metadata.get("choices")
    letter = {int: "N", float: "X"}.get(kind, field.name.upper())
    argument |= {"type": kind, "choices": choices, "metavar": None if choices else letter}
    return argument | ({"nargs": "+"} if several else {})


def parse_config(config_class, presets, description, argv=None):
    """Command line -> `config_class(**flags)`.

    --help: idea, everyday options, commands. --help-all: all options, the whole description.
    """
    argv, about = sys.argv[1:] if argv is None else argv, description or ""  # none with -OO
    everything = "--help-all" in argv
    epilog = f"By data set: see PRESETS; NAME-gpu: on a GPU (folder: from {MANY_IMAGES:,} images)."
    if not everything:
        epilog = "\n".join(line for line in about.splitlines() if line.startswith("    python "))
        first, *others = about.strip().split("\n\n")
        about = "\n\n".join([first, *(p for p in others if p.startswith("Idea"))])
    parser = _Parser(
        usage=argparse.SUPPRESS,
        description=about,
        epilog=epilog,
        formatter_class=partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=26, width=100
        ),
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name in sorted(fields, key=lambda n: EVERYDAY.index(n) if n in EVERYDAY else len(EVERYDAY)):
        argument = _argument(fields[name], hints[name], presets)
        if not everything and name not in EVERYDAY:
            argument["help"] = argparse.SUPPRESS
        parser.add_argument("--" + name.replace("_", "-"), **argument)
    parser.add_argument("--help-all", action="help", help="all options")
    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        _check(fields[name], value)
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})
