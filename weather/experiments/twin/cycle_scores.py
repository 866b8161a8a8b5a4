"""Run a method in its cycle and keep the errors of every analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle, Forecast, diverged
from weather.experiments.departures import Departures
from weather.metrics import DepartureSums, rmse
from weather.observations.gridded import GriddedObservations


class CycleScores(NamedTuple):
    """Errors of T cycles on B timelines, in the units of the C channels.

    Attributes:
        background: (T,B,C) RMSE of the background (ensemble mean).
        analysis: (T,B,C) RMSE of the analysis.
        spread: (T,B,C) ensemble standard deviation of the analysis, 0 for one member.
        lost: (B,) True where the cycle left the truth and was stopped.
        assimilated: Departures from the observations after the first third, lost timelines left
            out; None if not asked for.
        withheld: Departures from observations that an extra analysis did not see.
        timelines: (B,) number of each timeline in its period; None for all, in order.
    """

    background: Tensor
    analysis: Tensor
    spread: Tensor
    lost: Tensor
    assimilated: DepartureSums | None = None
    withheld: DepartureSums | None = None
    timelines: Tensor | None = None

    def rows(self, chosen: Tensor) -> CycleScores:
        """Return some of the timelines, with the departures of all."""
        return self._replace(
            background=self.background[:, chosen],
            analysis=self.analysis[:, chosen],
            spread=self.spread[:, chosen],
            lost=self.lost[chosen],
            timelines=chosen if self.timelines is None else self.timelines[chosen],
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, to be kept."""
        found = {name: value for name, value in self._asdict().items() if name in _TENSORS}
        for prefix, sums in (("assimilated.", self.assimilated), ("withheld.", self.withheld)):
            if sums is not None:
                found |= sums.tensors(prefix)
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CycleScores:
        """Return what :meth:`tensors` gave."""
        sums = {name: DepartureSums.from_tensors(tensors, f"{name}.") for name in _SUMS}
        own = {name: value for name, value in tensors.items() if name in _TENSORS}
        return cls(**own, **sums)  # type: ignore[arg-type]


_SUMS = ("assimilated", "withheld")
_TENSORS = tuple(name for name in CycleScores._fields if name not in _SUMS)


def score_cycle(
    forecast: Forecast,
    assimilator: Assimilator,
    first: Tensor,
    truth: Tensor,
    observations: Iterable[GriddedObservations],
    *,
    area_weights: Tensor,
    climatological_sd: Tensor,
    hours: float = 6.0,
    guard: bool = True,
    departures: Departures | None = None,
    tick: Callable[[], None] = lambda: None,
) -> CycleScores:
    """Cycle a method along a truth.

    Args:
        forecast: ``(states, hours) -> states``.
        assimilator: The method.
        first: (B,M,C,H,W) first background.
        truth: (T,B,C,H,W).
        observations: T batches of observations (B,C,H,W).
        area_weights: (H,) of the grid.
        climatological_sd: (C,) beyond 1.5 of which, or when not finite, a timeline counts as lost.
        hours: Length of a cycle.
        guard: Whether timelines can be lost; a free run cannot.
        departures: Takes the departures from the observations after the first third.
        tick: Called after every cycle, for progress.
    """
    lost = torch.zeros(truth.shape[1], dtype=torch.bool)
    backgrounds, analyses, spreads = [], [], []
    cycle = Cycle(forecast, assimilator, hours)
    for number, (now, step) in enumerate(zip(truth, cycle.run(first, observations), strict=True)):
        mean = step.analysis.mean(1)
        analyses.append(rmse(mean, now, area_weights))
        backgrounds.append(rmse(step.background.mean(1), now, area_weights))
        spreads.append(_spread(step.analysis, area_weights))
        if guard:
            lost |= diverged(mean - now, climatological_sd)
            # A lost timeline is scored as the free run; the truth keeps its arithmetic finite.
            step.analysis[lost] = now[lost].unsqueeze(1).to(step.analysis)
        if departures is not None and number >= len(truth) // 3:
            departures.add(step, assimilator, keep=~lost)
        tick()
    return CycleScores(
        torch.stack(backgrounds),
        torch.stack(analyses),
        torch.stack(spreads),
        lost,
        departures.assimilated if departures else None,
        departures.withheld if departures else None,
    )


def _spread(states: Tensor, area_weights: Tensor) -> Tensor:
    if states.shape[1] == 1:
        return states.new_zeros(states.shape[0], states.shape[2])
    variance = states.var(1).mean(-1) * area_weights.to(states)
    return variance.mean(-1).sqrt()


def settled(scores: CycleScores, free: CycleScores | None = None) -> Tensor:
    """Return the analysis RMSE (B,C) after the first third of the cycles.

    The mean square over the cycles is taken before the root. Lost timelines get the error of the
    free run.

    Args:
        scores: The scores.
        free: Those of the free run on the same timelines.

    Raises:
        ValueError: The free run has other timelines.
    """
    return settled_squares(scores, free).mean(0).sqrt()


def settled_squares(scores: CycleScores, free: CycleScores | None = None) -> Tensor:
    """Return the square errors (T,B,C) of the analyses that :func:`settled` averages."""
    own = scores.analysis[len(scores.analysis) // 3 :].square()
    if free is None:
        return own
    other = settled_squares(free)
    if other.shape != own.shape:
        raise ValueError(
            f"{own.shape[1]} timelines, but a free run of {other.shape[1]}: give the same"
        )
    return torch.where(scores.lost[:, None], other, own)
