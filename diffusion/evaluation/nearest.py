"""Which drawing an image is nearest to, by pixels."""

import torch
from torch import Tensor


def ranks_of(images: Tensor, drawings: Tensor, wanted: Tensor) -> Tensor:
    """Return the rank of the wanted drawing of each image among all, 1 for the nearest.

    Args:
        images: (N, ...) made ones.
        drawings: (M, ...) all drawings.
        wanted: (N,) places of the drawings that the images should show.
    """
    distances = torch.cdist(images.flatten(1).double(), drawings.flatten(1).double())
    own = distances.gather(1, wanted.view(-1, 1))
    return (distances < own).sum(1) + 1


def pixel_errors(images: Tensor, drawings: Tensor) -> Tensor:
    """Return the root mean squared error (N,) of images from the drawings that they should show."""
    return (images.double() - drawings.double()).square().flatten(1).mean(1).sqrt()
