"""The assimilation cycle: forecast, observe, analyze, and again."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.observations.gridded import GriddedObservations

Forecast = Callable[[Tensor, float], Tensor]
"""A forecast model: states (N, C, H, W) and hours to states of the same shape."""


@runtime_checkable
class FramesForecast(Protocol):
    """A forecast model that starts from two successive states, such as FengWu.

    Attributes:
        frames: 2.
        step_hours: Hours between the two.
    """

    frames: int
    step_hours: float

    def __call__(self, states: Tensor, hours: float, previous: Tensor | None = None) -> Tensor:
        """Return the states some hours later; ``previous`` are those one step earlier, if known."""


def advance(
    forecast: Forecast,
    states: Tensor,
    hours: float,
    previous: Tensor | None = None,
) -> Tensor:
    """Forecast states, from two frames if the model takes them.

    Args:
        forecast: The forecast model.
        states: (N, C, H, W).
        hours: Length of the forecast.
        previous: The states ``hours`` earlier, where they are known. A model whose frames lie
            otherwise apart does not get them.

    Returns:
        (N, C, H, W).
    """
    if isinstance(forecast, FramesForecast):
        fits = previous is not None and forecast.step_hours == hours
        return forecast(states, hours, previous if fits else None)
    return forecast(states, hours)


QualityControl = Callable[[GriddedObservations, Tensor], GriddedObservations]
"""Observations and the mean background, both (B, C, H, W), to the observations that pass."""


class CycleStep(NamedTuple):
    """One analysis time.

    Attributes:
        background: (B, M, C, H, W), the forecast from the previous analysis.
        analysis: (B, M, C, H, W). What it holds when the generator is advanced is what the next
            forecast starts from, so a caller may replace a timeline in place.
        observations: (B, C, H, W), those that passed quality control.
    """

    background: Tensor
    analysis: Tensor
    observations: GriddedObservations


class Cycle:
    """Alternate forecast and assimilation over independent timelines.

    The analysis, never the background, starts the next forecast; a model of two frames gets the
    last two analyses, and the very first one alone. An outage is a set of
    observations in which nothing is present.

    Args:
        forecast: Forecast model, called once per cycle with all B M states.
        assimilator: Assimilation method.
        hours: Length of a cycle.
        quality_control: Applied to the observations against the mean background, for example
            `weather.observations.gridded.gross_check`; none by default.
    """

    def __init__(
        self,
        forecast: Forecast,
        assimilator: Assimilator,
        hours: float = 6.0,
        *,
        quality_control: QualityControl | None = None,
    ) -> None:
        self.forecast, self.assimilator, self.hours = forecast, assimilator, hours
        self.quality_control = quality_control

    def run(
        self,
        background: Tensor,
        observations: Iterable[GriddedObservations],
        previous: Tensor | None = None,
    ) -> Iterator[CycleStep]:
        """Yield one step for each set of observations.

        To continue a cycle that was stopped, forecast its last analysis with `advance` and
        give that analysis as ``previous``.

        Args:
            background: (B, M, C, H, W) at the time of the first observations.
            observations: Sets of fields (B, C, H, W), ``hours`` apart.
            previous: (B, M, C, H, W), the analysis one cycle before, if there was one.

        Raises:
            ValueError: The background does not have the ensemble size of the assimilator.
        """
        members = self.assimilator.members
        if background.ndim != 5 or background.shape[1] != members:
            raise ValueError(
                f"expected a first background (B, {members}, C, H, W), found "
                f"{tuple(background.shape)}: the method works with {members} members"
            )
        analysis = None
        for available in observations:
            if analysis is not None:
                before = None if previous is None else previous.flatten(0, 1)
                flat = advance(self.forecast, analysis.flatten(0, 1), self.hours, before)
                background, previous = flat.reshape(analysis.shape), analysis
            accepted = available
            if self.quality_control is not None:
                accepted = self.quality_control(available, background.mean(1))
            analysis = self.assimilator.analyze(background, accepted)
            yield CycleStep(background, analysis, accepted)


def diverged(states: Tensor, climatological_sd: Tensor, limit: float = 1.5) -> Tensor:
    """Return which states are lost: not finite, or farther off than a random state would be.

    Two random states are ``sqrt(2)`` climatological standard deviations apart.

    Args:
        states: (..., C, H, W) departures from the truth, or from the climatological mean.
        climatological_sd: (C,) standard deviation of each channel.
        limit: Root mean square, in climatological standard deviations, of any channel.

    Returns:
        Boolean (...,).
    """
    square = states.square().mean((-2, -1)) / climatological_sd.to(states).square()
    return ~(square <= limit**2).all(-1)
