"""NVIDIA's public EDM checkpoints (.pkl), read without executing anything in them.

Such a pickle holds whole objects and, by design, the source text of their classes, which
unpickling would run. Here every object is only a record of the attributes it was saved with. From
them the constructor's arguments and the weights are taken. A name outside the short list below is
refused. The tensors of a file may not take more memory than the file has bytes.
"""
import collections
import io
import pickle
from pathlib import Path

import numpy as np
import torch

from common import UsageError

PUBLIC = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
NAMES = (  # the files of Karras et al. 2022, without ".pkl"
    "edm-cifar10-32x32-uncond-vp",
    "edm-cifar10-32x32-uncond-ve",
    "edm-cifar10-32x32-cond-vp",
    "edm-cifar10-32x32-cond-ve",
    "edm-imagenet-64x64-cond-adm",
    "edm-ffhq-64x64-uncond-vp",
    "edm-ffhq-64x64-uncond-ve",
    "edm-afhqv2-64x64-uncond-vp",
    "edm-afhqv2-64x64-uncond-ve",
)
SELECTS = {  # class, embedding_type, encoder_type -> factory of common.unet
    ("SongUNet", "positional", "standard"): "ddpmpp",
    ("SongUNet", "fourier", "residual"): "ncsnpp",
    ("DhariwalUNet",): "adm",
}
TAKEN = (  # constructor arguments that UNet takes as they are
    "model_channels",
    "channel_mult",
    "channel_mult_emb",
    "num_blocks",
    "attn_resolutions",
    "dropout",
    "label_dropout",
    "channel_mult_noise",
    "resample_filter",
)


class Unpickler(pickle.Unpickler):
    """Resolves the names in `allowed`, {(module, name): replacement}, and refuses every other.

    `what`: the kind of thing that is read, for the message.
    """

    def __init__(self, file, allowed, what, **options):
        super().__init__(file, **options)
        self.allowed, self.what = allowed, what

    def find_class(self, module, name):
        try:
            return self.allowed[module, name]
        except KeyError:
            message = f"it asks for {module}.{name}, which no {self.what} needs"
            raise pickle.UnpicklingError(message) from None

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to objects outside the file")


def encode(text, codec):
    """_codecs.encode, by which old pickles write bytes."""
    if codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"a text in {codec!r}")
    return text.encode("latin1")


class Record:
    """Stands for any object of the pickle: the attributes it was saved with, as `state`."""

    def __init__(self, class_name="", state=None):
        self.class_name, self.state = class_name, state

    def __setstate__(self, state):
        self.state = state


class _Module(Record):
    """torch's containers, which the pickle makes with __new__ and fills by __setstate__."""

    def __new__(cls, *arguments):
        return object.__new__(cls)


def _persistent(meta):
    """torch_utils.persistence: {"type", "version", "module_src", "class_name", "state"}.

    The source stays unread.
    """
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise pickle.UnpicklingError("a persistent object without a state")
    return Record(str(meta.get("class_name")), meta["state"])


class _Dtype:
    """numpy.dtype("f8", False, True) and its byte order, set afterwards; plain numbers only."""

    def __init__(self, code, *_):
        if code not in ("f8", "f4", "i8", "i4", "b1"):
            raise pickle.UnpicklingError(f"a numpy scalar of type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if state[1] == ">":
            raise pickle.UnpicklingError("a big-endian number")


def _scalar(kind, data):
    return np.frombuffer(data, kind.dtype, count=1)[0].item()


def _storage(data):
    """torch.storage._load_from_bytes: a tensor's bytes in torch's old, uncompressed format."""
    if data[:2] == b"PK":  # a small file could be anything in memory
        raise pickle.UnpicklingError("a compressed tensor")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage, offset, size, stride, *_):
    """torch._utils._rebuild_tensor_v2, dense only: no view is larger than its storage."""
    dense = torch.empty(size, device="meta").stride() if 0 not in size else stride
    end = offset + torch.Size(size).numel()
    if tuple(stride) != tuple(dense) or offset < 0 or end > len(storage):
        shape = f"shape {tuple(size)} and stride {tuple(stride)}"
        raise pickle.UnpicklingError(f"a tensor of {shape} on {len(storage)} values")
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage.untyped(), offset, tuple(size), tuple(stride))


ALLOWED = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch.nn.modules.container", "ModuleDict"): _Module,
    ("torch.nn.modules.container", "ModuleList"): _Module,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): encode,
}


def _weights(module, prefix, found, depth=0):
    """Collect name -> tensor of a module's record and of all below it."""
    state = getattr(module, "state", None)
    if not isinstance(state, dict) or depth > 20 or len(found) > 10_000:
        raise pickle.UnpicklingError(f"{prefix or 'ema'} is not a module")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in state[kind].items():
            if isinstance(tensor, torch.Tensor):
                found[f"{prefix}{name}"] = tensor.detach()
            elif tensor is not None:
                raise pickle.UnpicklingError(f"{prefix}{name} is not a tensor")
    for name, child in state["_modules"].items():
        if child is not None:
            _weights(child, f"{prefix}{name}.", found, depth + 1)
    return found


def _arch_and_kwargs(net):
    """A network's record -> name of our factory, its arguments."""
    given = dict(net.state["_init_kwargs"])
    selects = (net.class_name,)
    if net.class_name != "DhariwalUNet":
        embedding = given.get("embedding_type", "positional")
        selects += (embedding, given.get("encoder_type", "standard"))
    if selects not in SELECTS or given.get("decoder_type", "standard") != "standard":
        kind = ", ".join(map(str, selects))
        raise pickle.UnpicklingError(f"a network of the kind {kind} is not among ours")
    if given["in_channels"] != given["out_channels"]:
        raise pickle.UnpicklingError("its network has other output than input channels")
    kwargs = {
        "img_resolution": given["img_resolution"],
        "img_channels": given["in_channels"],
        "label_dim": given.get("label_dim", 0),
        "augment_dim": given.get("augment_dim", 0),
    }
    for name in TAKEN:
        if name in given:
            value = given[name]
            kwargs[name] = list(value) if isinstance(value, (list, tuple)) else value
    return SELECTS[selects], kwargs


def read_edm_pickle(path):
    """An EDM checkpoint -> {"arch", "kwargs", "sigma_data", "weights"}, as in our teacher files.

    Raises UsageError, in one line, if the file is missing, damaged, of another kind, or wants
    anything to be executed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--teacher {path}: {error.strerror}") from None
    try:
        record = Unpickler(io.BytesIO(data), ALLOWED, "EDM checkpoint").load()
        ema = record["ema"]
        if ema.class_name != "EDMPrecond":
            message = f"its network is a {ema.class_name!r}, not an EDMPrecond"
            raise pickle.UnpicklingError(message)
        weights = _weights(ema, "", {})
        arch, kwargs = _arch_and_kwargs(ema.state["_modules"]["model"])
        sigma_data = float(ema.state.get("sigma_data", 0.5))
    except Exception as error:  # a foreign or damaged pickle raises anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(
            f"--teacher {path}: not a readable EDM checkpoint ({reason}); nothing in it was run"
        ) from None
    return {"arch": arch, "kwargs": kwargs, "sigma_data": sigma_data, "weights": weights}
