"""Drawings as models take them."""

import numpy as np
import torch
from torch import Tensor

from diffusion.data.drawings import Drawings
from diffusion.data.styles import drawn


def images_of(drawings: Drawings, rows: np.ndarray, styles: tuple[str, ...] = ()) -> Tensor:
    """Return drawings (N, 3, H, W) from -1 to 1."""
    return torch.from_numpy(drawn(drawings, rows, styles)).permute(0, 3, 1, 2) * 2 - 1
