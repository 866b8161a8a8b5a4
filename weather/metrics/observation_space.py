"""Background and analysis against the observations themselves."""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from weather.observations.gridded import GriddedObservations


class DepartureSums(NamedTuple):
    """Sums over observations, (C,) float64 each, that add over cycles and processes.

    With ``b = y - H x_b`` and ``a = y - H x_a`` of every observation.

    Attributes:
        number: Number of observations.
        background: Sum of b.
        background_square: Sum of b**2.
        analysis: Sum of a.
        analysis_square: Sum of a**2.
    """

    number: Tensor
    background: Tensor
    background_square: Tensor
    analysis: Tensor
    analysis_square: Tensor

    @classmethod
    def of(cls, background: Tensor, analysis: Tensor, observations: GriddedObservations) -> Self:
        """Sum over everything but the channels.

        Args:
            background: (..., C, H, W), the ensemble mean if there is an ensemble.
            analysis: (..., C, H, W).
            observations: Fields (..., C, H, W): those that were assimilated, or some that were
                withheld and verify the analysis independently.
        """
        mask = observations.mask
        b = torch.where(mask, observations.values - background, 0.0).double()
        a = torch.where(mask, observations.values - analysis, 0.0).double()
        terms = (mask.double(), b, b.square(), a, a.square())
        return cls(*(term.movedim(-3, 0).flatten(1).sum(1) for term in terms))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the sums by name."""
        return {f"{prefix}{name}": value for name, value in self._asdict().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Self | None:
        """Return what :meth:`tensors` gave; None where it is not there."""
        if f"{prefix}number" not in tensors:
            return None
        return cls(*(tensors[f"{prefix}{name}"] for name in cls._fields))

    def plus(self, other: Self) -> Self:
        """Return the sums over both sets of observations."""
        return type(self)(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def background_bias(self) -> Tensor:
        """Return the mean (C,) of O-B; NaN without observations."""
        return self.background / self.number

    def background_rms(self) -> Tensor:
        """Return the root mean square (C,) of O-B."""
        return (self.background_square / self.number).sqrt()

    def analysis_bias(self) -> Tensor:
        """Return the mean (C,) of O-A."""
        return self.analysis / self.number

    def analysis_rms(self) -> Tensor:
        """Return the root mean square (C,) of O-A."""
        return (self.analysis_square / self.number).sqrt()
