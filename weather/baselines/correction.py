"""The network as a correction of optimal interpolation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.models.adas.analysis import AdasAnalysis
from weather.observations.gridded import GriddedObservations


def corrected(background: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return the background plus fractions of increments.

    Args:
        background: (B,...).
        parts: Fractions, and the analyses (B,...) of whose increments they are.
    """
    moved = background
    for fraction, analysis in parts:
        moved = moved + fraction * (analysis - background)
    return moved


class CorrectedInterpolation:
    """Add fractions of two increments, ``x_a = x_b + a (x_oi - x_b) + b (net(x_b, y) - x_b)``.

    With ``a = 1`` and ``b = 0`` it is interpolation to the last bit, with ``a = 0`` and ``b = 1``
    the network. A timeline that observes nothing keeps its background to the last bit.

    Args:
        network: Trained alone: its increment is not one on top of interpolation.
        interpolation: Any method with one member; None where ``alpha`` is 0.
        alpha: Fraction of the increment of the interpolation.
        beta: Fraction of the increment of the network.

    Raises:
        ValueError: A fraction is negative, or there is no interpolation.
    """

    members = 1

    def __init__(
        self,
        network: AdasAnalysis,
        interpolation: Assimilator | None = None,
        *,
        alpha: float = 0.0,
        beta: float = 1.0,
    ) -> None:
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha and beta must not be negative, got {alpha} and {beta}")
        if alpha and interpolation is None:
            raise ValueError(f"alpha is {alpha}, but there is no interpolation: give one, or 0")
        self.network, self.interpolation = network, interpolation
        self.alpha, self.beta = alpha, beta

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis (B,1,C,H,W); see `weather.baselines.assimilator.Assimilator`."""
        guess, guide = background, {}
        if self.interpolation is not None and (self.alpha or self.network.guided):
            guess = self.interpolation.analyse(background, observations)
            guide = {"interpolated": guess} if self.network.guided else {}
        if (self.alpha, self.beta) == (1.0, 0.0):
            return guess
        own = self.network.analyse(background, observations, **guide)
        return corrected(background, [(self.beta, own), (self.alpha, guess)])
