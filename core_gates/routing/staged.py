"""Gates that count optimizer steps, and those whose stage follows from the number."""

from abc import abstractmethod
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from core_gates.numerics import content_version
from core_gates.routing.base import Gate


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
        """Count one optimizer step; see :class:`Gate`."""
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
        """React to the number of updates, which the buffer holds already."""
        self._known_step = step
        self._stage = self.stage_at(step)
        self._known_version = content_version(self.step)

    def resume(self, step: int) -> None:
        """React to a number of updates that the buffer got other than by an update."""
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
