"""What a file with weights claims, checked before a network is built of it."""
import torch
from torch.overrides import TorchFunctionMode

from common.machinery.foreign import Refused

NUMBER = (int, float)
MOST_NUMBER, MOST_ITEMS = 2**15, 12  # in the arguments of a network; 12 levels halve 4096 pixels


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
        items = value if type(value) is list else [value]
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
