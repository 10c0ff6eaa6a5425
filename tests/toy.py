"""A teacher whose denoiser is exact, one that writes down its calls, and how numbers compare."""

import torch

from common.diffusion import GaussianMixture


def close(a, b, tolerance):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape and torch.isfinite(a).all(), (a, b)
    assert (a - b).abs().max() <= tolerance, (
        f"largest deviation {(a - b).abs().max():.3g}, allowed {tolerance:.3g}"
    )


class Toy(GaussianMixture):
    """A mixture that passes for a teacher: it has a network's image shape and number of classes."""

    class net:
        img_shape, label_dim = (1, 2, 2), 0


class Recorder(Toy):
    """It writes down the noise levels and labels it is called with."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.levels, self.labels = [], []

    def forward(self, x, sigma, labels=None):
        self.levels.append(float(sigma))
        self.labels.append(labels)
        return super().forward(x, sigma)


def five_blobs(std, kind=Toy):
    """Five Gaussians of that width at random places."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    return kind(means, torch.full((5,), std))
