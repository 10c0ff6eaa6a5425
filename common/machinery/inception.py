"""The Inception network of published FIDs, its weights, and EDM's reference moments."""
import hashlib
import io

import torch
from torch import nn

from common import UsageError
from common.machinery.files import cache_dir, download, locked
from common.machinery.foreign import Refused, check_weights, one_line, read_file

FILE = "pt_inception-2015-12-05-6726825d.pth"  # its last 8 hex digits begin its SHA-256
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
EDM_REFERENCES = {
    "cifar10": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz",
    "imagenet64": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/imagenet-64x64.npz",
}


class Inception(nn.Module):
    """Inception-v3 of the TensorFlow FID graph: uint8 (B, 3, H, W) -> pool3 features (B, 2048).

    Against torchvision's: 1008 classes, no auxiliary head, and other pools in the pool branches:
    averages that leave the padding out, and a maximum in the very last block. `weights` is
    pytorch-fid's state dict; unlike in pytorch-fid, images are resized as in the graph.
    """

    def __init__(self, weights):
        super().__init__()
        from torchvision.models import inception_v3

        self.net = inception_v3(
            weights=None, num_classes=1008, aux_logits=False, init_weights=False
        )
        self.net.load_state_dict(weights)
        classes = self.net.fc.weight.detach().clone()
        self.register_buffer("classes", classes, persistent=False)
        self.net.fc = nn.Identity()
        pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            _replace_pool(self.net.get_submodule(f"Mixed_{name}"), pool)
        _replace_pool(self.net.Mixed_7c, nn.MaxPool2d(3, 1, padding=1))
        self.eval().requires_grad_(False)

    def forward(self, images):
        resized = old_resize(old_resize(images.float(), 299).mT, 299).mT
        return self.net((resized - 128) / 128)

    def logits(self, features):
        """Of the Inception Score, (B, 1008): without the bias (Salimans et al. 2016)."""
        return features @ self.classes.T


def old_resize(x, size):
    """(..., H, W) -> (..., H, size), linear as in TensorFlow 1: place i reads i W / size."""
    width = x.shape[-1]
    place = torch.arange(size, device=x.device, dtype=torch.float64) * width / size
    left = place.long()
    right = (left + 1).clamp(max=width - 1)
    return torch.lerp(x[..., left], x[..., right], (place - left).to(x))


def _replace_pool(block, pool):
    """Let the pool branch of an Inception block, its last channels, see `pool` of the input."""
    width = block.branch_pool.conv.out_channels

    def hook(block, inputs, output):
        return torch.cat([output[:, :-width], block.branch_pool(pool(inputs[0]))], 1)

    block.register_forward_hook(hook)


def load_inception(path, fetch):
    """Inception with the weights at `path`, or in the cache, downloaded if `fetch`; None without.

    Raises UsageError where `path` is something else.
    """
    cached = cache_dir() / FILE
    if path is None and not fetch and not cached.exists():
        return None
    try:
        if path is None:
            with locked(cached):
                download(URL, cached, "Inception for FID")
        data = read_file(path or cached, 2**27)  # the true file has 96 MB
        if path is None and hashlib.sha256(data).hexdigest()[:8] != "6726825d":
            raise Refused("it is damaged, delete it")
        net = Inception(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        check_weights(net.state_dict())
        return net
    except Exception as error:  # torch.load raises anything, a foreign file may hold anything
        known = isinstance(error, (Refused, UsageError))
        why = one_line(error, 500) if known else type(error).__name__
    message = f"{path or cached}: not the weights of FID's Inception ({why}); take those of {URL}"
    if path is not None:
        raise UsageError(f"--inception {message}")
    print(f"{message}. Until then FID uses the data set's own classifier.")
    return None


def edm_reference(dataset_name):
    """The path of EDM's moments of a data set; None, and a line, where they cannot be had."""
    url = EDM_REFERENCES[dataset_name]
    path = cache_dir() / f"edm-{url.rsplit('/', 1)[1]}"
    try:
        with locked(path):
            return download(url, path, "EDM's reference moments")
    except UsageError as error:
        print(f"{error}. Until then the moments are those of the training images.")
        return None
