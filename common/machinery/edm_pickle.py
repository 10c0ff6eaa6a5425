"""NVIDIA's public EDM checkpoints (.pkl), read without executing anything in them.

Such a pickle holds whole objects and, by design, the source text of their classes, which
unpickling would run. `pickles.Machine` makes Records of what they were saved with; here the
network's weights and its constructor's arguments are picked from these, and each is checked.
The weights together may not take more memory than the file has bytes.
"""
import numpy as np
import torch

from common.machinery.foreign import Refused, check_weights, refusing
from common.machinery.pickles import PERSISTENT, Machine, Name, Record, call_of

PUBLIC = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
SETS = ("cifar10-32x32-uncond", "cifar10-32x32-cond", "ffhq-64x64-uncond", "afhqv2-64x64-uncond")
NAMES = (  # the files of Karras et al. 2022, without ".pkl"
    *(f"edm-{name}-{kind}" for name in SETS for kind in ("vp", "ve")),
    "edm-imagenet-64x64-cond-adm",
)
SELECTS = {  # class, embedding_type, encoder_type -> factory of common.unet
    ("SongUNet", "positional", "standard"): "ddpmpp",
    ("SongUNet", "fourier", "residual"): "ncsnpp",
    ("DhariwalUNet",): "adm",
}
TAKEN = (  # constructor arguments that UNet takes as they are
    "label_dim", "augment_dim", "model_channels", "channel_mult", "channel_mult_emb", "num_blocks",
    "attn_resolutions", "dropout", "label_dropout", "channel_mult_noise", "resample_filter",
)
READER = 3  # raise it when the reader changes: conversions in the cache are made again
MOST_BYTES = 2**31  # of a file; ImageNet-64's has 1.2 GB
MOST_WEIGHTS = 5_000

STORAGES = {"torch.DoubleStorage": "f8", "torch.FloatStorage": "f4", "torch.HalfStorage": "f2"}
TENSOR = "torch._utils._rebuild_tensor_v2"
PERSISTENT_OBJECT = "torch_utils.persistence._reconstruct_persistent_obj"
PARAMETER = "torch._utils._rebuild_parameter"
STORAGE = "torch.storage._load_from_bytes"
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
CONTAINERS = ("torch.nn.modules.container.ModuleDict", "torch.nn.modules.container.ModuleList")
ALLOWED = {PERSISTENT_OBJECT, PARAMETER, STORAGE, TENSOR, "numpy.dtype", *SCALARS, *CONTAINERS}


def typed(value, kind, what):
    """`value`, if it is exactly of that type; Refused otherwise."""
    if type(value) is not kind:
        raise Refused(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _object(record, what):
    """Class name and attributes of a persistent object or a container of torch.

    A persistent object's only argument: {"type", "version", "module_src", "class_name", "state"}.
    Its source stays unread.
    """
    if type(record) is Record and record.name in CONTAINERS:
        return "", typed(record.state, dict, what)
    meta = typed(call_of(record, PERSISTENT_OBJECT, what, 1)[0], dict, what)
    name = typed(meta.get("class_name"), str, "a class name")
    return name[:100], typed(meta.get("state"), dict, what)


# -------------------------------------------------------------------------------- weights


def _storage(record):
    """torch.storage._load_from_bytes: numpy's code of the type, the bytes of the values.

    They are what torch.save once wrote: five pickles (a magic number, a version, the system, the
    storage as a persistent id, its key), then the number of values and the values.
    """
    (data,) = call_of(record, STORAGE, "a storage")
    if type(data) is not bytes:
        raise Refused("a storage that is none")
    if data[:2] == b"PK":  # a small file could be anything in memory
        raise Refused("a compressed tensor")
    machine = Machine(data, {*STORAGES, PERSISTENT}, "storage", most=100)  # of 51
    magic, version, system = (machine.load() for _ in range(3))
    known = (magic, version) == (0x1950A86A20F9469CFC6C, 1001) and type(system) is dict
    if not known or system.get("little_endian") is not True:
        raise Refused("a storage that is not in torch's old format")
    (pid,) = call_of(machine.load(), PERSISTENT, "a storage")
    _, kind, _, _, count, *_ = typed(pid, tuple, "a storage")
    code = STORAGES[typed(kind, Name, "its type")]
    machine.load()
    end = machine.file.tell() + 8
    told, values = int.from_bytes(data[end - 8 : end], "little"), memoryview(data)[end:]
    if told != count or len(values) != told * np.dtype(code).itemsize:
        raise Refused(f"a storage of {told} values has {len(values)} bytes")
    return code, values


def _array(value, what):
    """A weight as a numpy array, a view of its storage: numpy checks that it lies within."""
    if type(value) is Record and value.name == PARAMETER:
        value = call_of(value, PARAMETER, what, 1)[0]
    storage, offset, size, stride = call_of(value, TENSOR, what, 4)[:4]
    code, values = _storage(storage)
    numbers = (offset, *typed(size, tuple, "a shape"), *typed(stride, tuple, "a stride"))
    if len(numbers) > 20 or not all(type(n) is int and 0 <= n < 2**40 for n in numbers):
        raise Refused(f"{what} has an impossible shape or stride")
    width = np.dtype(code).itemsize
    try:
        return np.ndarray(size, code, values, width * offset, [width * s for s in stride])
    except ValueError:
        count = len(values) // width
        raise Refused(f"a tensor of shape {size} and stride {stride} on {count} values") from None


def _arrays(module, prefix, found, seen):
    """{name: array} of a module's record and of all below it.

    Each record is visited once: shared ones could make a short file endless.
    """
    what = prefix[:-1] or "ema"
    if id(module) in seen:
        raise Refused(f"{what} is a module in more than one place")
    seen.add(id(module))
    _, state = _object(module, what)
    for kind in ("_parameters", "_buffers"):
        for name, value in typed(state.get(kind), dict, f"{what}.{kind}").items():
            name = f"{prefix}{typed(name, str, 'a name')}"
            if value is not None:
                found[name] = _array(value, name)
            seen.add((kind, name))
            if len(seen) > 2 * MOST_WEIGHTS:
                raise Refused("it has too many weights")
    for name, child in typed(state.get("_modules"), dict, f"{what}._modules").items():
        if child is not None:
            _arrays(child, f"{prefix}{typed(name, str, 'a name')}.", found, seen)
    return found


# -------------------------------------------------------------------------------- arguments


def _arch_and_kwargs(record):
    """A network's record -> name of our factory, its arguments. Their values are not checked."""
    class_name, state = _object(record, "ema.model")
    given = typed(state.get("_init_kwargs"), dict, "_init_kwargs")

    def option(name, default="standard"):
        return typed(given.get(name, default), str, name)[:100]

    selects = (class_name,)
    if class_name != "DhariwalUNet":
        selects += (option("embedding_type", "positional"), option("encoder_type"))
    if selects not in SELECTS or option("decoder_type") != "standard":
        kind = ", ".join(selects)
        raise Refused(f"a network of the kind {kind} is not among ours")
    sizes = ("img_resolution", "in_channels", "out_channels")
    resolution, channels, out = (typed(given.get(name), int, name) for name in sizes)
    if channels != out:
        raise Refused("its network has other output than input channels")
    kwargs = {"img_resolution": resolution, "img_channels": channels}
    return SELECTS[selects], kwargs | {name: given[name] for name in TAKEN if name in given}


def read_edm_pickle(data, path):
    """An EDM checkpoint's bytes -> {"arch", "kwargs", "sigma_data", "weights"}, as for our files.

    Neither sigma_data is checked here nor whether the weights fit the arguments. Raises UsageError,
    in one line, if the file `path` is damaged, of another kind, or wants anything to be executed.
    """
    what = f"--teacher {path}: not a readable EDM checkpoint"
    with refusing(what, "; nothing in it was run"):
        root = typed(Machine(data, ALLOWED, "EDM checkpoint").load(), dict, "it")
        class_name, state = _object(root.get("ema"), "its 'ema'")
        if class_name != "EDMPrecond":
            raise Refused(f"its network is a {class_name!r}; those with EDMPrecond are read")
        model = typed(state.get("_modules"), dict, "ema._modules").get("model")
        arch, kwargs = _arch_and_kwargs(model)
        arrays = _arrays(root["ema"], "", found={}, seen=set())
        if sum(array.nbytes for array in arrays.values()) > len(data):
            raise Refused("its weights are larger than the file")
        weights = {name: torch.from_numpy(array.copy("C")) for name, array in arrays.items()}
        check_weights(weights)
    sigma_data = state.get("sigma_data", 0.5)
    return {"arch": arch, "kwargs": kwargs, "sigma_data": sigma_data, "weights": weights}
