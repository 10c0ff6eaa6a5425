"""What a training needs, estimated before it starts: memory, and the words for a duration."""
import math
import os

import torch
from torch.func import functional_call


def bytes_of_training(net, batch_size):
    """About what training `net`, a U-Net, on `batch_size` images takes.

    20 bytes a parameter: weight, gradient, Adam's two moments, an average. And what the forward
    pass keeps for the backward pass, counted on one image without data, on the device "meta".
    """
    meta = {}
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        meta[name] = torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
    weights = {tensor.untyped_storage()._cdata for tensor in meta.values()}
    kept = {}  # storages, held so that none is counted twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    x = torch.empty(1, *net.img_shape, device="meta")
    labels = torch.empty(1, net.label_dim, device="meta") if net.label_dim else None
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), hooks:
        functional_call(net, meta, (x, torch.empty(1, device="meta"), labels))
    images = batch_size * sum(storage.nbytes() for storage in kept.values())
    return images + 20 * sum(parameter.numel() for parameter in net.parameters())


def bytes_at_hand(device):
    """Of the GPU, else of the machine; None where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def words_for(seconds):
    """'40 s', '12 minutes', '7.5 hours', '9 days'."""
    for unit, length, least in (("days", 86400, 2), ("hours", 3600, 2), ("minutes", 60, 2)):
        if seconds >= least * length:
            digits = unit == "hours" and seconds < 10 * length
            return f"{seconds / length:.{int(digits)}f} {unit}"
    return f"{math.ceil(seconds)} s"
