"""The velocity that cud.py learns, as a Denoiser: a rectified flow is a denoiser too."""
from common.diffusion import Denoiser, expand, flow_from_edm, x0_from_velocity


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
