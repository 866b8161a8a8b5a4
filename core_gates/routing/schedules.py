"""Schedules of temperatures and of stages, and the phase of a staged gate."""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from core_gates.errors import check_at_least, check_option, check_positive
from core_gates.numerics import content_version
from core_gates.routing.base import Gate

Schedule = Callable[[int], float]
Shape = Literal["linear", "exponential", "cosine", "cubic", "logarithmic"]


@dataclass(frozen=True)
class TemperatureSchedule:
    """Go from ``start`` to ``end`` within ``num_steps`` steps and stay there.

    The value may be a temperature or anything else, such as a threshold that grows in stages:
    ``[schedule(stage) for stage in range(num_steps + 1)]``.

    With progress p = (step - delay) / num_steps, clipped to [0, 1], the value is

    - linear: start + p (end - start),
    - exponential: start (end / start)^p, the decay of EvoMoE (Nie et al., 2021),
    - cosine: end + (start - end) (1 + cos πp) / 2,
    - cubic: end + (start - end) (1 - p)³, which changes most at the beginning,
    - logarithmic: log(e^start + p (e^end - e^start)), for thresholds of SoRA (arXiv 2311.11696).

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
        check_at_least(0, num_steps=self.num_steps, delay=self.delay)
        check_option("shape", self.shape, get_args(Shape))
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
        return self._between((step - self.delay) / self.num_steps)

    def _between(self, progress: float) -> float:
        if self.shape == "exponential":
            return self.start * math.pow(self.end / self.start, progress)
        if self.shape == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
        if self.shape == "cubic":
            return self.end + (self.start - self.end) * (1 - progress) ** 3
        if self.shape == "logarithmic":
            top = max(self.start, self.end)  # taken out, so that no power overflows
            low, high = math.exp(self.start - top), math.exp(self.end - top)
            return top + math.log(low + progress * (high - low))
        return self.start + progress * (self.end - self.start)


@dataclass(frozen=True)
class SparsitySchedule:
    """Raise the fraction of closed experts, gates or weights by a cubic (Zhu & Gupta, 2017).

    The sparsity goes from ``start`` to ``end`` as ``end + (start - end) (1 - p)³``: much is closed
    while much is left, little at the end.

    Args:
        end: Last sparsity; ``1 - k / num_experts`` leaves k experts open on average.
        num_steps: Length of the transition.
        start: First sparsity.
        delay: Steps before the transition.
        every: Steps between two changes; the value stays in between.

    Raises:
        ValueError: A sparsity is not between 0 and 1, or a length is out of range.
    """

    end: float
    num_steps: int
    start: float = 0.0
    delay: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a sparsity between 0 and 1, got {value}")
        check_at_least(1, every=self.every)
        self._transition()  # checks the lengths

    def __call__(self, step: int) -> float:
        """Return the sparsity at ``step``."""
        if self.delay < step < self.delay + self.num_steps:
            step -= (step - self.delay) % self.every
        return self._transition()(step)

    def _transition(self) -> TemperatureSchedule:
        return TemperatureSchedule(self.start, self.end, self.num_steps, "cubic", self.delay)


@dataclass(frozen=True)
class PiecewiseSchedule:
    """Hold ``values[i]`` from step ``boundaries[i - 1]`` until the next boundary.

    Args:
        boundaries: Steps, strictly increasing, at which the value changes.
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
            raise ValueError(f"boundaries must increase strictly, got {self.boundaries}")

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self.values[sum(step >= boundary for boundary in self.boundaries)]


@dataclass(frozen=True)
class StagedSchedule:
    """The three stages of EvoMoE (Nie et al., 2021), counted in optimizer steps.

    1. ``shared``: for ``shared_steps`` every token uses expert 0; then spawn the others from it.
    2. ``annealing``: all experts, fewer and fewer as the temperature falls from ``start`` to
       ``end`` within ``annealing_steps``.
    3. ``hard``: one expert per token.

    Args:
        shared_steps: Length of the first stage; 0 leaves it out.
        annealing_steps: Length of the second stage (recommended: 40 % of all steps).
        start: First temperature. At 2, with 8 experts and a gate that is still zero, an expert
            hardly ever falls below the threshold 0.001: spawning then preserves the function.
        end: Last temperature.
        shape: Form of the transition.
        hardens: Whether there is a third stage; else the last temperature stays.

    Raises:
        ValueError: A length is negative or a temperature is not positive.
    """

    shared_steps: int = 0
    annealing_steps: int = 4000
    start: float = 2.0
    end: float = 0.3
    shape: Shape = "exponential"
    hardens: bool = True

    def __post_init__(self) -> None:
        check_at_least(0, shared_steps=self.shared_steps, annealing_steps=self.annealing_steps)
        check_positive(start=self.start, end=self.end)
        self._schedule()  # checks the shape

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Numbers of optimizer steps after which the next stage begins."""
        end = self.shared_steps + self.annealing_steps
        return (self.shared_steps, end) if self.hardens else (self.shared_steps,)

    def stage_at(self, step: int) -> int:
        """Return 0, 1 or 2 for the stage after ``step`` optimizer steps."""
        return bisect_right(self.boundaries, step)

    def spawns_at(self, step: int) -> bool:
        """Return whether the experts are spawned after ``step`` optimizer steps."""
        return 0 < self.shared_steps == step

    def temperature_at(self, step: int) -> float:
        """Return the temperature after ``step`` optimizer steps."""
        return self._schedule()(step)

    def _schedule(self) -> TemperatureSchedule:
        return TemperatureSchedule(
            self.start, self.end, self.annealing_steps, self.shape, self.shared_steps
        )


class SteppedGate(Gate):
    """Base of gates that count optimizer steps in a buffer, ``step``.

    Args:
        dim: Features of a routing input.
        num_experts: Number of experts.
        device: Device of the count.
    """

    step: Tensor

    def __init__(
        self, dim: int, num_experts: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(dim, num_experts, device=device)
        self.register_buffer("step", torch.empty((), device=device, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Return to step 0; a subclass resets its parameters, too."""
        self.step.zero_()

    def update(self, summary: Tensor | None = None, step: int | None = None) -> None:  # noqa: ARG002
        """Count one optimizer step; see `Gate`."""
        step = int(self.step) + 1 if step is None else step
        self.step.fill_(step)
        self.advance(step)

    def advance(self, step: int) -> None:
        """Set what follows from the number of steps; empty by default.

        Args:
            step: Number of optimizer steps done, which the buffer holds already.
        """


class StagedGate(SteppedGate):
    """Base of gates that behave differently in each of their ``phases``.

    The stage follows from the buffer ``step`` whenever it is asked for, however the buffer came to
    its value: by an update, by loading, by an average of models or from another rank. On the CPU
    the buffer is read each time; elsewhere where its version has changed, and a device-side
    assertion notices what changes no version (a collective on the buffer itself).

    A graph of ``torch.compile`` holds for one stage. An update and ``load_state_dict`` lead to a
    new one; after any other change of the buffer it refuses to run, until ``phase`` has been read
    outside of the graph.

    Args:
        dim: Features of a routing input.
        num_experts: Number of experts.
        device: Device of the count.
    """

    def __init__(
        self, dim: int, num_experts: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(dim, num_experts, device=device)
        self._stage = 0
        self._known_step = 0
        self._known_version: tuple[int, int] | None = None
        self.register_load_state_dict_post_hook(_settle)  # type: ignore[no-untyped-call]

    @property
    @abstractmethod
    def boundaries(self) -> tuple[int, ...]:
        """Numbers of updates after which the next of the ``phases`` begins, non-decreasing."""

    @property
    def stage(self) -> int:
        """Index of the present stage into ``phases``."""
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                self._assert_stage()
        else:
            self._settle()
        return self._stage

    @property
    def known_step(self) -> int:
        """Value of the buffer ``step`` as a plain number, outside of ``torch.compile``."""
        self._settle()
        return self._known_step

    @property
    def phase(self) -> str:
        """Name of the present stage."""
        return self.phases[self.stage]

    def reset_parameters(self) -> None:
        """Return to step 0; a subclass resets its parameters, too."""
        super().reset_parameters()
        self.enter(0)

    def advance(self, step: int) -> None:
        """Enter the stage after ``step`` updates."""
        self.enter(step)

    def enter(self, step: int) -> None:
        """Enter the phase that belongs to ``step`` updates."""
        self._known_step = step
        self._stage = self.stage_at(step)
        self._known_version = content_version(self.step)

    def resume(self, step: int) -> None:
        """Enter the phase of a step count that was loaded or set, not reached by an update."""
        self.enter(step)

    def stage_at(self, step: int) -> int:
        """Return the index into ``phases`` after ``step`` updates."""
        return bisect_right(self.boundaries, step)

    def _settle(self) -> None:
        if self.step.is_meta:
            return
        version = content_version(self.step)
        if version is not None and version == self._known_version:
            self._assert_stage()
            return
        step = int(self.step)
        if step != self._known_step or version is not None:
            self.resume(step)

    def _assert_stage(self) -> None:
        first, *later = (0, *self.boundaries)[self._stage :]
        right = self.step >= first
        if later:
            right = right & (self.step < later[0])
        torch._assert_async(
            right,
            f"the phase of a {type(self).__name__} has changed since this graph was compiled or its"
            " buffers were read; read gate.phase once, outside of torch.compile, and call again",
        )


def _settle(gate: StagedGate, _incompatible_keys: Any) -> None:
    gate._settle()
