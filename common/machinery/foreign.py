"""Files from anywhere: how each is opened, what is said where it is refused, and what a file with
weights claims, checked before a network is built of it.
"""
import contextlib
import os
import stat

import torch
from torch.overrides import TorchFunctionMode

from common import UsageError

NUMBER = (int, float)
MOST_NUMBER, MOST_ITEMS = 2**15, 12  # in the arguments of a network; 12 levels halve 4096 pixels


class Refused(ValueError):
    """The file is not what was asked for; says why."""


@contextlib.contextmanager
def refusing(what, hint=""):
    """Whatever fails within becomes one UsageError: what it was, why in brackets, a hint.

    Foreign and damaged files raise anything.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, LookupError):  # its text is a name alone
            reason = f"{type(error).__name__}: {reason}"
        raise UsageError(f"{what} ({reason}){hint}") from None


def one_line(error, most=200):
    """An exception's text, of which a file may have written a part: one line, printable."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def file_size(path):
    """Bytes of a file. Refused if it is none: opening a pipe would wait for its other end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Refused("it is not a file")
    return status.st_size


def read_file(path, most, begins=b""):
    """The bytes of a file from anywhere, read once: what is hashed is also what is parsed.

    Refused unless it is a regular file of 1 to `most` bytes that begins with `begins`.
    """
    size = file_size(path)
    if not 0 < size <= most:
        raise Refused(f"it has {size:,} bytes, not 1 to {most:,}")
    with open(path, "rb") as file:
        if not file.peek(len(begins)).startswith(begins):
            raise Refused("it begins like another kind of file")
        return file.read(size)


# ----------------------------------------------------------------------------- networks


def check_weights(weights):
    """Refused unless {name: tensor} are all finite in float32, in which they are used."""
    for name, weight in weights.items():
        if not weight.float().isfinite().all():
            raise Refused(f"its weight {name} has values that are not finite")


def _check_arguments(kwargs):
    """Refused unless a constructor's arguments are words, believable numbers, or few of them."""
    if type(kwargs) is not dict:
        raise Refused(f"its arguments are a {type(kwargs).__name__}")
    for name, value in kwargs.items():
        items = value if type(value) in (list, tuple) else [value]
        fits = all(type(v) is str or type(v) in NUMBER and abs(v) <= MOST_NUMBER for v in items)
        if not fits or len(items) > MOST_ITEMS:
            shown = value if type(value) in NUMBER else f"a {type(value).__name__}"
            raise Refused(f"its {name} is {shown}: not a word or a number, or too large")
    for name in ("dropout", "label_dropout"):
        if not 0 <= kwargs.get(name, 0) <= 1:
            raise Refused(f"its {name} is {kwargs[name]}")
    taps = kwargs.get("resample_filter", [1, 1])
    if len(taps) % 2 or not sum(taps):
        raise Refused("its resample_filter has an odd number of weights, or the sum 0")


class _WithoutMemory(TorchFunctionMode):
    """Weights without values. `with torch.device("meta")` would import a thousand modules."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        if function is torch.nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **kwargs)


def check_network(make, state):
    """Refused unless a file's weights are those of the network that it claims.

    state: {"kwargs", "sigma_data", "weights": checked}. make(**kwargs): its module, with their
    names. It is made without memory, and not before the file has weights enough for as many blocks.
    """
    sigma_data, kwargs = state.get("sigma_data"), state.get("kwargs")
    if type(sigma_data) not in NUMBER or not 1e-6 < sigma_data < 1e6:
        shown = sigma_data if type(sigma_data) in NUMBER else "no number"
        raise Refused(f"its sigma_data is {shown}, not a number from 1e-6 to 1e6")
    _check_arguments(kwargs)
    shapes = {name: tuple(weight.shape) for name, weight in state["weights"].items()}
    sizes = kwargs.get("channel_mult", (2, 2, 2)), kwargs.get("num_blocks", 4)
    blocks = len(sizes[0]) * (2 * sizes[1] + 1)
    if blocks > len(shapes):
        raise Refused(f"it claims {blocks} blocks, with {len(shapes)} weights")
    with torch.random.fork_rng([]), _WithoutMemory():
        net = make(**kwargs)
    needed = {name: tuple(weight.shape) for name, weight in net.state_dict().items()}
    for name in sorted(needed.keys() | shapes.keys()):
        if needed.get(name) != shapes.get(name):
            has, needs = shapes.get(name, "missing"), needed.get(name, "no weight")
            raise Refused(f"its weights do not fit its architecture ({name}: {has}, not {needs})")
