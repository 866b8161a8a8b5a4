"""Several assimilation methods in one cycle."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.observations.gridded import GriddedObservations


class SideBySide:
    """Analyze equal parts of the timelines with one method each, so that they share the forecast.

    Args:
        methods: N methods with the same number of members; the first takes the first Nth of the
            timelines, and so on.

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
            ValueError: B is no multiple of the number of methods.
        """
        count = len(self.methods)
        if len(background) % count:
            raise ValueError(
                f"{len(background)} timelines cannot be split evenly among {count} methods"
            )
        parts = zip(
            self.methods,
            background.chunk(count),
            observations.values.chunk(count),
            observations.errors.chunk(count),
            strict=True,
        )
        return torch.cat([m.analyse(x, GriddedObservations(y, e)) for m, x, y, e in parts])
