"""Simulated observing networks, and the noisy observations they make of a truth."""

import torch
from torch import Tensor

from weather.data.coastline import land_mask
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations, per_channel

LAND_PREFERENCE = 12.0  # stations per area over land against sea, about that of surface reports


def bernoulli_network(grid: Grid, density: float, *, seed: int) -> Tensor:
    """Observe every grid point independently with probability ``density``.

    Returns:
        Boolean (H, W).

    Raises:
        ValueError: If ``density`` lies outside [0, 1].
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(
            f"density is {density}, expected a fraction of the grid points from 0 to 1"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(grid.shape, generator=generator) < density


def station_network(grid: Grid, count: int, *, seed: int) -> Tensor:
    """Draw ``count`` different grid points by cell area, twelve times denser over land.

    Returns:
        Boolean (H, W) with exactly ``count`` true points.

    Raises:
        ValueError: If the grid has fewer than ``count`` points.
    """
    num_points = grid.shape[0] * grid.shape[1]
    if not 0 <= count <= num_points:
        raise ValueError(f"count is {count}, expected 0 to {num_points}, the points of the grid")
    chosen = _draw_without_replacement(_station_weight(grid).flatten(), count, seed)
    network = torch.zeros(num_points, dtype=torch.bool)
    network[chosen] = True
    return network.view(grid.shape)


def observe(
    truth: Tensor,
    network: Tensor,
    error_sd: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> GriddedObservations:
    """Observe a truth through a network, with Gaussian errors of the stated standard deviation.

    Args:
        truth: (..., C, H, W) in physical units.
        network: Boolean, broadcastable to the truth: (H, W) observes all channels at the same
            points, (C, H, W) each channel at its own.
        error_sd: (C,) or broadcastable to the truth, positive.
        generator: Source of the noise; the global one by default.

    Raises:
        ValueError: If an error is not positive.
    """
    errors = per_channel(error_sd).to(truth).expand_as(truth)
    drawn = torch.randn(truth.shape, generator=generator, dtype=truth.dtype)
    values = truth + errors * drawn.to(truth.device)
    return GriddedObservations.from_values(values, errors).withhold(network.to(truth.device))


def _station_weight(grid: Grid) -> Tensor:
    weight = grid.area_weights()[:, None].expand(grid.shape).clone()
    weight[land_mask(grid)] *= LAND_PREFERENCE
    return weight


def _draw_without_replacement(weight: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` draws by weight (Efraimidis and Spirakis 2006: the smallest E/w)."""
    generator = torch.Generator().manual_seed(seed)
    waiting = -torch.rand(weight.shape, generator=generator, dtype=torch.float64).log()
    return (waiting / weight).topk(count, largest=False).indices
