"""What a checkpoint claims: checked before torch reads it and before a network is built of it."""
import zipfile

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from common.machinery.pickles import (
    PERSISTENT,
    STORAGES,
    TENSOR,
    Machine,
    Refused,
    call_of,
    check_view,
    file_size,
    storage_claim,
)

# ---------------------------------------------------------------------- a file of torch.save

NAMES = {
    *STORAGES, PERSISTENT, TENSOR, "torch._utils._rebuild_parameter", "torch.Size",
    "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16", "torch.int64",
}


def check_file(path):
    """Refused unless a file of torch.save holds plain values and tensors, and is no bomb.

    torch.load with weights_only runs no foreign code, but makes whatever sizes a file claims. So
    here its entries must be uncompressed, its storages there, its tensors within them.
    """
    size = file_size(path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        plain = len(entries) == len(archive.infolist())  # no name twice
        plain = plain and not any(entry.compress_type for entry in entries.values())
        plain = plain and min((e.header_offset for e in entries.values()), default=1) == 0
        if not plain or sum(entry.file_size for entry in entries.values()) > size:
            raise Refused("a zip that torch did not write")
        roots = [name for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or entries[roots[0]].file_size > 2**26:
            raise Refused("no readable data.pkl")
        machine = Machine(archive.read(roots[0]), NAMES, "checkpoint", most=1_500_000)
    machine.load()
    folder, total = roots[0].removesuffix("data.pkl"), 0
    for record in machine.records:
        if record.name == PERSISTENT:
            code, key, count = storage_claim(record)
            entry = entries.get(f"{folder}data/{key}")
            if entry is None or entry.file_size != count * np.dtype(code).itemsize:
                raise Refused("a storage of another size than its entry")
        elif record.name == TENSOR:
            storage, offset, shape, stride, _, _ = call_of(record, TENSOR)
            code, _, count = storage_claim(storage)
            values = check_view(offset, shape, stride, count, dense=False)
            total += values * np.dtype(code).itemsize
    if total > 2 * size + 2**24:
        raise Refused("tensors much larger than the file")


def check_weights(weights):
    """Refused unless it is {name: tensor}, all finite in float32, in which they are used."""
    if not isinstance(weights, dict):
        raise Refused(f"its weights are a {type(weights).__name__}, not a dict")
    for name, weight in weights.items():
        if type(name) is not str or not isinstance(weight, torch.Tensor):
            raise Refused("its weights are not all tensors with names")
        if not weight.float().isfinite().all():
            raise Refused(f"its weight {name} has values that are not finite")


# -------------------------------------------------------------------------------- a network

WHOLE = {  # argument of UNet -> the least and the most that is believed
    "img_resolution": (1, 2**12),
    "img_channels": (1, 2**10),
    "patch": (1, 8),
    "label_dim": (0, 2**20),
    "augment_dim": (0, 2**16),
    "model_channels": (1, 2**14),
    "channel_mult_emb": (1, 2**6),
    "channel_mult_noise": (1, 2**6),
    "num_blocks": (1, 2**10),
}
WHOLE_LISTS = {"channel_mult": (1, 2**6), "attn_resolutions": (1, 2**12)}
SHARES = ("dropout", "label_dropout")
WORDS = ("embedding_type", "encoder_type")
LEVELS = 12  # of a resolution of 4096


def _check_arguments(kwargs):
    """Refused unless a constructor's arguments are of the right types, within what is believed."""
    if type(kwargs) is not dict:
        raise Refused(f"its arguments are a {type(kwargs).__name__}")
    for name, value in kwargs.items():
        if name in WHOLE:
            low, high = WHOLE[name]
            right, fits = f"a whole number from {low} to {high}", _whole(value, low, high)
        elif name in WHOLE_LISTS:
            low, high = WHOLE_LISTS[name]
            right = f"at most {LEVELS} whole numbers from {low} to {high}"
            fits = type(value) in (list, tuple) and len(value) <= LEVELS
            fits = fits and all(_whole(v, low, high) for v in value)
            fits = fits and bool(value or name != "channel_mult")
        elif name in SHARES:
            right, fits = "a number from 0 to 1", type(value) in (int, float) and 0 <= value <= 1
        elif name == "resample_filter":
            right = "2, 4, 6 or 8 numbers"
            fits = type(value) in (list, tuple) and len(value) in (2, 4, 6, 8)
            fits = fits and all(type(v) in (int, float) and abs(v) < 2**16 for v in value)
            fits = fits and sum(value) != 0
        elif name in WORDS:
            right, fits = "a word", type(value) is str
        else:
            raise Refused(f"it has an unknown argument {name}")
        if not fits:
            shown = value if type(value) in (int, float, str) else f"a {type(value).__name__}"
            if not value and type(value) in (list, tuple):
                shown = "empty"
            raise Refused(f"its {name} is {shown}, not {right}")


def _whole(value, low, high):
    return type(value) is int and low <= value <= high


class _WithoutMemory(TorchFunctionMode):
    """Weights without values. `with torch.device("meta")` would import a thousand modules."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        if function is torch.nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **kwargs)


def check_shapes(make, kwargs, shapes):
    """Refused unless make(**kwargs), a module, has weights of these `shapes`, {name: (...)}.

    It is made without memory, and not before the file has weights enough for as many blocks.
    """
    _check_arguments(kwargs)
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


def check_network(make, state):
    """Refused unless a file's weights are those of the network that it claims.

    state: {"kwargs", "sigma_data", "weights": checked}. make(**kwargs): its module, with their
    names.
    """
    sigma_data, weights = state.get("sigma_data"), state.get("weights", {})
    if type(sigma_data) not in (int, float) or not 1e-6 < sigma_data < 1e6:
        shown = sigma_data if type(sigma_data) in (int, float) else "no number"
        raise Refused(f"its sigma_data is {shown}, not a number from 1e-6 to 1e6")
    check_shapes(make, state.get("kwargs"), {name: tuple(w.shape) for name, w in weights.items()})
