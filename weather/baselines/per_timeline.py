"""One assimilation method for each timeline."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.observations.gridded import GriddedObservations


class PerTimeline:
    """Analyze timeline b with method b, so that networks of different seeds share a cycle.

    Args:
        methods: One for each timeline, all with the same number of members.

    Raises:
        ValueError: There is none, or their members differ.
    """

    def __init__(self, methods: Sequence[Assimilator]) -> None:
        members = {method.members for method in methods}
        if len(members) != 1:
            raise ValueError(
                f"expected methods of one ensemble size, found {sorted(members) or 'no method'}"
            )
        self.methods, self.members = list(methods), members.pop()

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis (B, M, C, H, W).

        Raises:
            ValueError: There are more or fewer timelines than methods.
        """
        if len(background) != len(self.methods):
            raise ValueError(f"{len(background)} timelines, expected {len(self.methods)}")
        rows = [slice(row, row + 1) for row in range(len(background))]
        return torch.cat(
            [
                method.analyse(
                    background[row],
                    GriddedObservations(observations.values[row], observations.errors[row]),
                )
                for method, row in zip(self.methods, rows, strict=True)
            ]
        )
