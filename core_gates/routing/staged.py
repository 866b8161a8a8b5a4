"""Gates whose stage follows from the number of optimizer steps."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput


class StagedGate(Gate):
    """Base of gates that behave differently in each of their ``phases``.

    The steps are counted in a buffer. The stage that follows is also held as a plain number, which
    is renewed when the buffer changes or is loaded: ``forward`` branches on it without reading a
    device.

    Args:
        dim: Features of a routing input.
        num_experts: Number of experts.
        device: Device of the count.
    """

    step: Tensor

    def __init__(
        self, dim: int, num_experts: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(dim, num_experts)
        self.register_buffer("step", torch.empty((), device=device, dtype=torch.int64))
        self._stage = 0
        self.register_load_state_dict_post_hook(_settle)  # type: ignore[no-untyped-call]

    @abstractmethod
    def stage_at(self, step: int) -> int:
        """Return the index into ``phases`` after ``step`` updates."""

    @property
    def phase(self) -> str:
        """Name of the present stage."""
        return self.phases[self._stage]

    def reset_parameters(self) -> None:
        """Return to step 0; a subclass resets its parameters beside it."""
        self.step.zero_()
        self.enter(0)

    def update(self, routings: Sequence[RoutingOutput]) -> None:  # noqa: ARG002
        """Count one optimizer step."""
        self.step += 1
        self.enter(int(self.step))

    def enter(self, step: int) -> None:
        """Renew what ``forward`` needs as plain numbers after ``step`` updates."""
        self._stage = self.stage_at(step)


def _settle(gate: StagedGate, _incompatible_keys: Any) -> None:
    if not gate.step.is_meta:
        gate.enter(int(gate.step))
