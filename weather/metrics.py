"""Scores of analyses: fields over areas, as WeatherBench 2 defines them, cycles, and departures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from harness.evidence import Row, Scores
from weather.baselines.assimilator import Assimilator
from weather.cycle import CycleStep
from weather.grid import Grid, at_least_single
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import bernoulli_network
from weather.training.stream import generator


def spatial_mean(field: Tensor, weights: Tensor) -> Tensor:
    """Average over latitude and longitude.

    Args:
        field: (..., H, W).
        weights: (H,) for each row, as `Grid.area_weights`, or (H, W). Values where the weight is
            zero do not matter, not even NaN.

    Returns:
        (...,), in single precision at least: sums over a globe exceed half precision.

    Raises:
        ValueError: The weights do not fit the field.
    """
    field = at_least_single(field)
    if weights.ndim == 1:
        weights = weights[:, None].expand(-1, field.shape[-1])
    if weights.shape != field.shape[-2:]:
        raise ValueError(
            f"expected weights (H,) or (H, W) for a field {tuple(field.shape)}, found "
            f"{tuple(weights.shape)}"
        )
    weights = weights.to(field)
    return torch.where(weights == 0, 0.0, field * weights).sum((-2, -1)) / weights.sum()


def mse(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean square error (...,).

    The difference is in single precision at least, as its square may exceed half.
    """
    return spatial_mean((at_least_single(forecast) - at_least_single(truth)).square(), weights)


def rmse(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the root mean square error (...,) of every field."""
    return mse(forecast, truth, weights).sqrt()


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
        """Return what `tensors` gave; None where it is not there."""
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


WITHHELD_SHARE = 0.1


def withheld_points(grid: Grid, *keys: int) -> Tensor:
    """Return the grid points (H,W) whose observations verify an analysis made without them."""
    return bernoulli_network(grid, WITHHELD_SHARE, seed=generator(*keys).initial_seed())


class Departures:
    """Sums of departures from assimilated and from withheld observations.

    The withheld observations are missing in an extra analysis of the same background, never in the
    cycle itself: their errors are independent of that analysis.

    Args:
        points: (B,H,W) true at the points to withhold.
        every: Analyses between two extra ones.

    Attributes:
        assimilated: Departures from all observations, of the analysis that saw them.
        withheld: Departures from the withheld ones, of the extra analyses.
    """

    def __init__(self, points: Tensor, *, every: int = 1) -> None:
        self.points, self.every = points.unsqueeze(1), every
        self.assimilated: DepartureSums | None = None
        self.withheld: DepartureSums | None = None
        self._seen = 0

    def add(self, step: CycleStep, assimilator: Assimilator, keep: Tensor | None = None) -> None:
        """Add one analysis.

        Args:
            step: Background, analysis and observations.
            assimilator: What made the analysis.
            keep: (B,) timelines that count, all if None.
        """
        observations = step.observations
        if keep is not None:
            observations = observations.withhold(keep[:, None, None, None])
        background = step.background.mean(1)
        self.assimilated = _plus(self.assimilated, background, step.analysis.mean(1), observations)
        if self._seen % self.every == 0:
            analysis = assimilator.analyze(step.background, observations.withhold(~self.points))
            self.withheld = _plus(
                self.withheld, background, analysis.mean(1), observations.withhold(self.points)
            )
        self._seen += 1


def _plus(
    sums: DepartureSums | None,
    background: Tensor,
    analysis: Tensor,
    observations: GriddedObservations,
) -> DepartureSums:
    sums_now = DepartureSums.of(background, analysis, observations)
    return sums_now if sums is None else sums.plus(sums_now)


def figures(
    assimilated: DepartureSums | None, withheld: DepartureSums | None
) -> dict[str, list[float]]:
    """Return what is reported, by the stem of its name: a value for each channel, NaN for none.

    ``ob`` and ``oa`` are observation minus background and minus analysis; ``withheld_rmse`` is the
    root mean square of withheld observation minus analysis, which holds the observation error too.
    """
    summary: dict[str, Tensor] = {}
    if assimilated is not None:
        summary = {
            "ob_bias": assimilated.background_bias(),
            "ob_rms": assimilated.background_rms(),
            "oa_bias": assimilated.analysis_bias(),
            "oa_rms": assimilated.analysis_rms(),
        }
    if withheld is not None:
        summary["withheld_rmse"] = withheld.analysis_rms()
    return {name: torch.as_tensor(values).tolist() for name, values in summary.items()}


def departure_rows(
    method: str,
    task: str,
    labels: Sequence[str],
    sums: Sequence[DepartureSums | None],
    n: int = 1,
) -> list[Row]:
    """Return what `figures` reports as rows, one for each of the channels with these labels.

    Args:
        method: What was scored.
        task: On what.
        labels: Of the C channels.
        sums: Departures from assimilated and from withheld observations.
        n: Independent units.
    """
    return [
        Row(method, task, f"{stem}_{label}", value, n=n)
        for stem, values in figures(*sums).items()
        for label, value in zip(labels, values, strict=True)
    ]


def joined(parts: Iterable[Scores]) -> Scores:
    """Return the scores of all parts, which differ in their names, as one function of weights."""
    shared = list(parts)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value for part in shared for name, value in part(weights).items()}

    return scores
