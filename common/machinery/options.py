"""Command line <-> dataclass: a field is a flag; its help, choices and range stand beside it."""
import argparse
import dataclasses
import math
import sys
import typing
from pathlib import Path

import torch

from common import UsageError
from common.machinery.diffusers_teachers import is_diffusers, sigma_range
from common.machinery.ranks import leave_group

EDM_RANGE = (0.002, 80.0)  # sigma_min, sigma_max
DATASETS = ("digits", "mnist", "cifar10", "imagenet64", "folder")


def cli(main):
    """Run `main()` as a program: `UsageError` -> one line and exit code 2, Ctrl-C -> 130."""
    program = Path(sys.argv[0]).name
    try:
        main()
        leave_group()
    except UsageError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"{program}: error: {str(error).splitlines()[0]} Try a smaller --eval-batch "
            "or, where there is one, --batch-per-gpu or --checkpoint",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def option(default, help, **metadata):
    """A dataclass field that is also a flag. A default of None is filled from the presets.

    metadata: `choices`; `low`, `high` (inclusive) and `above`, `below` (exclusive) bounds of the
    value, or of each of several values; `repeats`: of these, some may be equal.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass
class Options:
    """The options that mean the same in every script."""

    dataset: str = option("digits", "data set; decides teacher and presets", choices=DATASETS)
    data_dir: str | None = option(
        None, "where the data lies (default: the cache; folder and imagenet64: required)"
    )
    seed: int = option(
        0, "seed of all that is drawn in training; evaluation has its own seeds 0, 1, 2, ..."
    )
    out: str | None = option(None, "folder of the run (default: runs/METHOD-DATASET)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    resume: bool = option(False, "go on from the checkpoint in --out")
    smoke: bool = option(False, "the whole path in seconds")
    eval_n: int | None = option(None, "images for RMSE and FID, of seeds 0, 1, 2, ...", low=2)
    eval_batch: int | None = option(None, "images per batch while sampling", low=1)
    inception: str | None = option(
        None,
        "FID weights of Inception (default: the cache, else a download, else the data set's "
        "own classifier)",
    )
    reference: str | None = option(
        None,
        "moments to compare with: an .npz like EDM's, or `train`: of the training images "
        "(default: EDM's with Inception on cifar10 or imagenet64, else `train`)",
    )
    recall: bool = option(False, "also precision and recall: keeps the features of all images")

    @property
    def classifier_steps(self):
        """What shortens the training of a classifier under --smoke."""
        return 5 if self.smoke else None


@dataclasses.dataclass
class TeacherOptions(Options):
    teacher: str | None = option(
        None, "a checkpoint, an EDM .pkl, a model of diffusers (default: the data set's own)"
    )


@dataclasses.dataclass
class SolverOptions(TeacherOptions):
    """Those of a script that learns how to sample from a teacher."""

    sigma_min: float | None = option(
        None, "lowest noise level (default: EDM's 0.002, or of the teacher's training)", above=0
    )
    sigma_max: float | None = option(
        None, "highest noise level (default: EDM's 80, or of the teacher's training)", above=0
    )


@dataclasses.dataclass
class TrainingOptions(Options):
    """Those of a script that trains a network."""

    batch_per_gpu: int | None = option(
        None, "images at a time: larger batches are summed up in parts (default: all)", low=1
    )
    checkpoint: bool = option(
        False, "recompute blocks in the backward pass: less memory, a third more time"
    )
    compile: bool = option(False, "torch.compile the networks")


@dataclasses.dataclass
class DistillationOptions(TeacherOptions, TrainingOptions):
    """Those of a script that trains a copy of the teacher."""

    sigma_max: float | None = option(
        None, "highest noise level (default: EDM's 80, or of the teacher's training)",
        above=1, below=math.inf,
    )


def require(condition, option_name, value, right):
    """Raise `UsageError` with the option, its value and what is right, unless `condition`."""
    if not condition:
        raise UsageError(f"--{option_name.replace('_', '-')} {value}: {right}")


def complete(config, presets, smoke):
    """Fill what is None from the data set's preset (with --smoke: from `smoke` first); check it.

    A single value of a field that takes several becomes a tuple; repeated values are dropped.
    Raises UsageError.
    """
    if config.dataset not in presets:
        raise UsageError(f"--dataset {config.dataset}: choose one of {', '.join(presets)}")
    for name, value in {**presets[config.dataset], **(smoke if config.smoke else {})}.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    teacher = getattr(config, "teacher", None)
    known = sigma_range(teacher) if teacher and is_diffusers(teacher) else EDM_RANGE
    for name, value in zip(("sigma_min", "sigma_max"), known):
        if getattr(config, name, value) is None:
            setattr(config, name, value)
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            if field.name == "eval_n" and config.recall:  # every image needs three neighbours
                require(value >= 4, "eval_n", value, "--recall needs at least 4")
            if _takes_several(hints[field.name]):
                value = (value,) if isinstance(value, (int, float, str)) else tuple(value)
                if "repeats" not in field.metadata:
                    value = tuple(dict.fromkeys(value))
                setattr(config, field.name, value)
            for part in value if isinstance(value, tuple) else (value,):
                _check(field, part)


def _check(field, value):
    meta = field.metadata
    if "choices" in meta:
        names = ", ".join(map(str, meta["choices"]))
        require(value in meta["choices"], field.name, value, f"choose one of {names}")
    bounds = {
        "low": ("at least", lambda bound: value >= bound),
        "high": ("at most", lambda bound: value <= bound),
        "above": ("above", lambda bound: value > bound),
        "below": ("below", lambda bound: value < bound),
    }
    for key, (words, holds) in bounds.items():
        if key in meta:
            require(holds(meta[key]), field.name, value, f"must be {words} {meta[key]}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def _takes_several(annotation):
    return tuple in map(typing.get_origin, (annotation, *typing.get_args(annotation)))


def _type_of_one(annotation):
    """The type of one value behind `int`, `int | None`, `tuple[int, ...]`, ..."""
    parts = [a for a in typing.get_args(annotation) if a not in (type(None), Ellipsis)]
    return _type_of_one(parts[0]) if parts else annotation


def _argument(field, annotation, presets):
    """What argparse is told about a field."""
    text, default = field.metadata["help"], field.default
    if default is None and any(field.name in preset for preset in presets.values()):
        default = "by data set, see below"
    if "(default" not in text:
        text = f"{text} (default: {default})"
    argument = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if _type_of_one(annotation) is bool:
        plain = field.default is False
        argument["action"] = "store_true" if plain else argparse.BooleanOptionalAction
        return argument
    choices = field.metadata.get("choices")
    argument.update(type=_type_of_one(annotation), choices=choices)
    argument["metavar"] = None if choices else field.name.upper()
    if _takes_several(annotation):
        argument["nargs"] = "+"
    return argument


def parse_config(config_class, presets, description, argv=None):
    """Command line -> `config_class(**flags)`. The method's own options come first in --help."""
    epilog = ["Presets (a flag given on the command line wins):"]
    for dataset, preset in presets.items():
        epilog.append(f"  {dataset:11s}" + "  ".join(f"{k}={v}" for k, v in preset.items()))
    parser = _Parser(
        description=description,
        epilog="\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config_class)
    shared = {field.name for field in dataclasses.fields(TrainingOptions)} - {"dataset", "data_dir"}
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name in shared):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, **_argument(field, hints[field.name], presets))
    flags = vars(parser.parse_args(argv))
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})
