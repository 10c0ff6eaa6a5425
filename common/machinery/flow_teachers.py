"""The velocity that cud.py learns, as a Denoiser: a rectified flow is a denoiser too."""
import torch

from common import UsageError
from common.diffusion import Denoiser, expand, flow_from_edm, x0_from_velocity
from common.machinery.pickles import one_line


class FlowDenoiser(Denoiser):
    """D(x, sigma) = (x - sigma v(z, t)) / (1 + sigma) with z, t = flow_from_edm(x, sigma).

    v: a raw network conditioned on t. phi: ShakeDrop's share of the decoder at t = 0, or None.
    """

    def __init__(self, net, phi=None):
        super().__init__(net)
        self.phi = phi

    def forward(self, x, sigma, labels=None, augment_labels=None):
        z, t = flow_from_edm(x, sigma)
        dtype = next(self.model.parameters()).dtype
        t = t.flatten().expand(len(x)).to(dtype)  # (B,)
        balance = None if self.phi is None else t * (1 - 2 * self.phi) + self.phi
        v = self.model(z.to(dtype), t, labels, balance=balance)
        return x0_from_velocity(v.to(x.dtype), x, expand(sigma, x))


def flow_state(checkpoint, path):
    """cud.py's checkpoint.pt -> what a teacher's file has: arch, kwargs, phi, weights of its EMA.

    Raises UsageError.
    """
    try:
        return _flow_state(checkpoint)
    except Exception as error:  # a damaged file holds anything
        raise UsageError(
            f"--teacher {path}: a checkpoint of cud.py without its velocity ({one_line(error)})"
        ) from None


def _flow_state(checkpoint):
    config, prefix = checkpoint["config"], "cud.net."
    weights = checkpoint["parts"]["emas"]
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    first = [name for name in weights if name.startswith("enc.")][0]  # enc.32x32_conv.weight
    names = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout")
    kwargs = {name: config[name] for name in names}
    kwargs["img_resolution"] = int(first.removeprefix("enc.").split("x")[0])
    kwargs["img_channels"] = weights[first].shape[1]
    label = weights.get("map_label.weight", torch.zeros(0, 0))
    kwargs["label_dim"] = label.shape[1]
    phi = config["phi"] if config["shakedrop"] else None
    weights = {f"model.{name}": value for name, value in weights.items()}
    about = {"arch": config["arch"], "kwargs": kwargs, "flow": {"phi": phi}, "sigma_data": 0.5}
    return {**about, "weights": weights}
