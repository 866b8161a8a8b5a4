"""What one observation changes: the increment that shows the structure of a method's errors."""

from __future__ import annotations

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.observations.gridded import GriddedObservations


def single_observation_increment(
    assimilator: Assimilator,
    background: Tensor,
    cell: tuple[int, int, int],
    *,
    innovation: float,
    error: float,
) -> Tensor:
    """Return the increment (M, C, H, W) of one observation.

    Args:
        assimilator: The method; one that remembers its last analyses is given no history.
        background: (M, C, H, W), with the ensemble size of the method.
        cell: Channel, row and column that is observed.
        innovation: Observation minus the mean background there.
        error: Standard deviation of the observation error.

    Raises:
        ValueError: The cell is off the grid.
    """
    shape = tuple(background.shape[1:])
    if not all(0 <= index < extent for index, extent in zip(cell, shape, strict=True)):
        raise ValueError(f"the cell {cell} lies outside of (C, H, W) = {shape}")
    values = background.new_zeros(1, *shape)
    errors = torch.full_like(values, torch.inf)
    values[0][cell] = background[:, cell[0], cell[1], cell[2]].mean() + innovation
    errors[0][cell] = error
    with torch.no_grad():
        analysis = assimilator.analyse(background[None], GriddedObservations(values, errors))
    return analysis[0] - background
