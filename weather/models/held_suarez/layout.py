"""Where the prognostic fields of the primitive equations lie in one spectral tensor."""

from typing import NamedTuple

import torch
from torch import Tensor


class PrimitiveFields(NamedTuple):
    """Prognostic fields of N members in L layers; leading dimensions are those of the tensor.

    Attributes:
        vorticity: (..., N, L), s-1.
        divergence: (..., N, L), s-1.
        temperature: (..., N, L), departure from the reference, K.
        surface: (..., N, 1), logarithm of the surface pressure over the reference.
    """

    vorticity: Tensor
    divergence: Tensor
    temperature: Tensor
    surface: Tensor


class PrimitiveLayout:
    """The last dimension K = N (3 L + 1): fields outermost, then members, then layers.

    Args:
        num_layers: L.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    def members(self, packed: Tensor) -> int:
        """Return N."""
        return packed.shape[-1] // (3 * self.num_layers + 1)

    def split(self, packed: Tensor) -> PrimitiveFields:
        """Return the fields of (..., K)."""
        members = self.members(packed)
        block = members * self.num_layers
        shape = (*packed.shape[:-1], members, self.num_layers)
        vorticity, divergence, temperature = (
            packed[..., i * block : (i + 1) * block].reshape(shape) for i in range(3)
        )
        surface = packed[..., 3 * block :].unsqueeze(-1)
        return PrimitiveFields(vorticity, divergence, temperature, surface)

    def join(
        self, vorticity: Tensor, divergence: Tensor, temperature: Tensor, surface: Tensor
    ) -> Tensor:
        """Undo `split`."""
        upper = [field.flatten(-2) for field in (vorticity, divergence, temperature)]
        return torch.cat((*upper, surface.squeeze(-1)), dim=-1)
