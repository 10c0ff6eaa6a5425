"""What a file with weights claims, checked before a network is built of it."""
import torch
from torch.overrides import TorchFunctionMode

from common.machinery.foreign import Refused

NUMBER = (int, float)
ARGUMENTS = {  # of UNet: type, the least and the most that is believed, of a list: how many
    "img_resolution": (int, 1, 2**12, None),
    "img_channels": (int, 1, 2**10, None),
    "label_dim": (int, 0, 2**20, None),
    "augment_dim": (int, 0, 2**16, None),
    "model_channels": (int, 1, 2**14, None),
    "channel_mult_emb": (int, 1, 2**6, None),
    "channel_mult_noise": (int, 1, 2**6, None),
    "num_blocks": (int, 1, 2**6, None),
    "patch": (int, 1, 2**6, None),
    "channel_mult": (int, 1, 2**6, range(1, 13)),  # 12 levels: a resolution of 4096
    "attn_resolutions": (int, 1, 2**12, range(13)),
    "resample_filter": (NUMBER, -(2**16), 2**16, (2, 4, 6, 8)),
    "dropout": (NUMBER, 0, 1, None),
    "label_dropout": (NUMBER, 0, 1, None),
}
WORDS = ("embedding_type", "encoder_type")


def check_weights(weights):
    """Refused unless {name: tensor} are all finite in float32, in which they are used."""
    for name, weight in weights.items():
        if not weight.float().isfinite().all():
            raise Refused(f"its weight {name} has values that are not finite")


def _check_arguments(kwargs):
    """Refused unless a constructor's arguments are of the right types, within what is believed."""
    if type(kwargs) is not dict:
        raise Refused(f"its arguments are a {type(kwargs).__name__}")
    for name, value in kwargs.items():
        if name in WORDS and type(value) is str:
            continue
        if name not in ARGUMENTS:
            raise Refused(f"it has an unknown argument {name}")
        kinds, low, high, counts = ARGUMENTS[name]
        kinds = kinds if type(kinds) is tuple else (kinds,)
        items = [value] if counts is None else value
        fits = type(items) is list and (counts is None or len(items) in counts)
        if not (fits and all(type(v) in kinds and low <= v <= high for v in items)):
            shown = value if type(value) in (int, float, str) else f"a {type(value).__name__}"
            kind = "whole number" if kinds == (int,) else "number"
            kind = f"{min(counts)} to {max(counts)} {kind}s" if counts else f"a {kind}"
            raise Refused(f"its {name} is {shown}, not {kind} from {low} to {high}")
    if sum(kwargs.get("resample_filter", [1])) == 0:
        raise Refused("its resample_filter is all 0")


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
    sigma_data, weights = state.get("sigma_data"), state["weights"]
    if type(sigma_data) not in NUMBER or not 1e-6 < sigma_data < 1e6:
        shown = sigma_data if type(sigma_data) in NUMBER else "no number"
        raise Refused(f"its sigma_data is {shown}, not a number from 1e-6 to 1e6")
    check_shapes(make, state.get("kwargs"), {name: tuple(w.shape) for name, w in weights.items()})
