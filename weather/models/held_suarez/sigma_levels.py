"""Vertical discretization in sigma = pressure over surface pressure (Durran, 2010, section 8.6).

Layers are equidistant in sigma; winds, temperature and geopotential live at their centers, the
vertical velocity at their edges. All operators are matrices that multiply a last dimension of
layers from the right, so that a field (..., L) becomes ``field @ matrix``. Hydrostatic equation and
energy conversion are adjoint to each other, which conserves energy.
"""

import torch
from torch import Tensor, nn

from weather.models.earth import GAS_CONSTANT


class SigmaLevels(nn.Module):
    """Operators between L equidistant sigma layers, counted from the top.

    Args:
        num_layers: L.

    Attributes:
        centers: Sigma at the centers (L,).
        thickness: 1 / L.
        hydrostatic: (L, L), temperature to geopotential above the surface, J kg-1 K-1.
        compression: (L, L), the sum of divergence and advection of ln ps to the part of omega / p
            that it takes away.
        lift: (L, L - 1), the same sum to the sigma velocity at the inner edges, s-1.
        residual: (L, L), one minus `compression`.

    Raises:
        ValueError: There are fewer than two layers.
    """

    centers: Tensor
    hydrostatic: Tensor
    compression: Tensor
    lift: Tensor
    residual: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        if num_layers < 2:
            raise ValueError(f"num_layers must be at least 2, got {num_layers}")
        self.num_layers = num_layers
        self.thickness = 1 / num_layers
        edges = torch.linspace(0, 1, num_layers + 1, dtype=torch.float64)
        centers = (edges[1:] + edges[:-1]) / 2
        half_logs = (torch.cat((centers[1:], edges[-1:])) / centers).log()
        half_logs[:-1] /= 2  # the last reaches from the lowest center to the surface
        ones = torch.ones(num_layers, num_layers, dtype=torch.float64)
        # weights[j, k]: how much of a quantity of layer j, summed from the top, acts in layer k
        weights = ones.triu() * half_logs
        weights[:, 1:] += ones.triu(1)[:, 1:] * half_logs[:-1]
        operators = {
            "centers": centers,
            "hydrostatic": GAS_CONSTANT * weights.T,
            "compression": weights,
            "lift": self.thickness * (edges[1:-1] - ones.triu()[:, :-1]),
            "residual": torch.eye(num_layers, dtype=torch.float64) - weights,
        }
        for name, operator in operators.items():
            self.register_buffer(name, operator.contiguous(), persistent=False)
