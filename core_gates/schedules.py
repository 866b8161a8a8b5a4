"""Schedules: pure functions from a step to a float, safe to copy, store and compare."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Callable[[int], float]
Shape = Literal["linear", "exponential", "cosine"]


@dataclass(frozen=True)
class TemperatureSchedule:
    """Go from ``start`` to ``end`` within ``num_steps`` steps and stay there.

    With progress p = (step - delay) / num_steps, clipped to [0, 1], the value is

    - linear: start + p (end - start),
    - exponential: start (end / start)^p, the decay of EvoMoE (Nie et al., 2021),
    - cosine: end + (start - end) (1 + cos πp) / 2.

    Args:
        start: Value up to and including step ``delay``.
        end: Value from step ``delay + num_steps`` on.
        num_steps: Length of the transition; 0 jumps to ``end`` after step ``delay``.
        shape: Form of the transition.
        delay: Steps before the transition.

    Raises:
        ValueError: ``num_steps`` or ``delay`` is negative, the shape is unknown, or an exponential
            transition has an end that is not positive.
    """

    start: float
    end: float
    num_steps: int
    shape: Shape = "linear"
    delay: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 0 or self.delay < 0:
            raise ValueError(
                f"num_steps and delay must not be negative, got {self.num_steps} and {self.delay}"
            )
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape is {self.shape!r}; choose one of {', '.join(get_args(Shape))}")
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(
                f"an exponential schedule needs positive ends, got {self.start} and {self.end}"
            )

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        if step <= self.delay:
            return self.start
        if step >= self.delay + self.num_steps:
            return self.end
        progress = (step - self.delay) / self.num_steps
        if self.shape == "exponential":
            return self.start * math.pow(self.end / self.start, progress)
        if self.shape == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
        return self.start + progress * (self.end - self.start)


@dataclass(frozen=True)
class PiecewiseSchedule:
    """Hold ``values[i]`` from step ``boundaries[i - 1]`` until the next boundary.

    Args:
        boundaries: Steps, strictly rising, at which the value changes.
        values: One value more than there are boundaries.

    Raises:
        ValueError: The boundaries do not rise or the lengths do not fit.
    """

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} values,"
                f" got {len(self.values)}"
            )
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"boundaries must rise strictly, got {self.boundaries}")

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self.values[sum(step >= boundary for boundary in self.boundaries)]
