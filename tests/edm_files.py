"""Files as NVIDIA's EDM writes them, genuine and hostile, for test_edm_pickle and test_foreign."""

import collections
import io
import pickle
import sys
import types
import warnings

import numpy as np
import torch
from torch import nn

from common import unet
from common.diffusion import Denoiser

# A stand-in of torch_utils.persistence (golden/README.md, end of section 1). Objects are saved as
# a call of one function with a dictionary that holds the source of their class, which the real
# one executes.
persistence = types.ModuleType("torch_utils.persistence")
exec(
    "def _reconstruct_persistent_obj(meta):\n"
    "    raise RuntimeError('the embedded source would be run here')",
    persistence.__dict__,
)
persistence._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
SOURCE = "import pathlib; pathlib.Path('HACKED').touch()"


class Persistent(nn.Module):
    """A module as NVIDIA saves it."""

    def __init__(self, class_name, **attributes):
        super().__init__()
        self.__dict__.update(attributes, _class_name=class_name)

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k != "_class_name"}
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        meta |= {"class_name": self._class_name, "state": state}
        return persistence._reconstruct_persistent_obj, (meta,)


def persistent(module):
    """Our module and all below it as Persistent; containers stay torch's."""
    children = {name: persistent(child) for name, child in module._modules.items()}
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict(children)
    copy = Persistent(type(module).__name__)
    copy._parameters, copy._buffers = module._parameters, module._buffers
    copy._modules = collections.OrderedDict(children)
    return copy


NETS = {
    "ddpmpp": (unet.ddpmpp, "SongUNet", dict(
        embedding_type="positional", encoder_type="standard", decoder_type="standard",
        channel_mult_noise=1, resample_filter=[1, 1],
    )),
    "ncsnpp": (unet.ncsnpp, "SongUNet", dict(
        embedding_type="fourier", encoder_type="residual", decoder_type="standard",
        channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
    )),
    "adm": (unet.adm, "DhariwalUNet", {}),
}


def edm_object(arch="ddpmpp", label_dim=0, augment_dim=9, resolution=16, **more):
    """{"ema", "loss_fn", ...} as EDM's training loop saves it, and the Denoiser that it holds."""
    factory, class_name, more_arguments = NETS[arch]
    sizes = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
    sizes |= {"dropout": 0.13, **more}
    denoiser = Denoiser(factory(resolution, 3, label_dim, augment_dim, **sizes)).eval()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.1 * torch.randn_like(p))
    net = persistent(denoiser.net)
    arguments = dict(img_resolution=resolution, label_dim=label_dim)
    own = dict(in_channels=3, out_channels=3, augment_dim=augment_dim, **sizes, **more_arguments)
    net.__dict__.update(
        _class_name=class_name, _init_args=(), _init_kwargs=arguments | own,
        skip_scale=np.sqrt(0.5),  # numpy's scalars are in parts that are not read
    )
    ema = Persistent(
        "EDMPrecond", sigma_data=0.5, sigma_min=0, sigma_max=float("inf"), use_fp16=False,
        _init_args=(), _init_kwargs=dict(arguments, img_channels=3, model_type=class_name),
    )
    ema._modules["model"] = net
    loss = Persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5)
    pipe = Persistent("AugmentPipe", p=0.12)
    data = {"path": "cifar10.zip"}
    value = {"ema": ema, "loss_fn": loss, "augment_pipe": pipe, "dataset_kwargs": data}
    return value, denoiser


def dump(value, protocol=4):
    """pickle.dumps while torch_utils.persistence exists."""
    sys.modules.update(
        {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence}
    )
    try:
        return pickle.dumps(value, protocol)
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Storage:
    """A storage whose bytes are given."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def saved(tensor, **options):
    buffer = io.BytesIO()
    options = {"_use_new_zipfile_serialization": False} | options
    with warnings.catch_warnings(action="ignore"):  # torch itself saves its deprecated storages
        torch.save(tensor.storage(), buffer, **options)
    return buffer.getvalue()


def with_weight(tensor):
    value, _ = edm_object()
    value["ema"]._modules["model"]._modules["map_layer0"]._parameters["weight"] = tensor
    return value


class Opaque:
    """Anything that pickles to what is given, in the place of a weight."""

    def __init__(self, reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def tensor_of(storage, offset, size, stride):
    arguments = storage, offset, size, stride, False, collections.OrderedDict()
    return Opaque((torch._utils._rebuild_tensor_v2, arguments))


def vector_of(data):
    """A weight of 4 values whose storage has these bytes."""
    return tensor_of(Storage(data), 0, (4,), (1,))


small = Storage(saved(torch.zeros(4)))
