"""A teacher whose denoiser is exact, small enough for any test."""

import torch

from common.diffusion import GaussianMixture


class Toy(GaussianMixture):
    """A mixture that passes for a teacher: it has a network's image shape and number of classes."""

    class net:
        img_shape, label_dim = (1, 2, 2), 0


def five_blobs(std):
    """Five Gaussians of that width at random places."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    return Toy(means, torch.full((5,), std))
