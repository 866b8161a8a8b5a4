"""What every way to use several adapters at once offers, gated or not."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from torch import nn

from diffusion.lora_file import LoraBundle


@runtime_checkable
class Fusion(Protocol):
    """Adapters of a model, in force while attached.

    The model keeps its own layers, the same objects with the same bits, after :meth:`detach` and
    after an error inside a ``with`` block. Fusions are modules whose parameters are what is
    trained, if anything is.

    Attributes:
        adapters: Name -> adapter, in order.
        strengths: Name -> factor of what the adapter does; 0 is off.
    """

    adapters: dict[str, LoraBundle]
    strengths: dict[str, float]

    @property
    def model(self) -> nn.Module:
        """The model."""
        ...

    @property
    def attached(self) -> bool:
        """Whether the adapters are in force."""
        ...

    def attach(self) -> Self:
        """Put the adapters in force.

        Raises:
            GatesError: They are, or the model has others.
        """
        ...

    def detach(self) -> None:
        """Leave the model as it was."""
        ...

    def __enter__(self) -> Self:
        """Attach."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach, whatever happened."""
        ...

    def set_adapters(self, adapters: Mapping[str, LoraBundle]) -> None:
        """Exchange the adapters for others; strengths are 1 again.

        Raises:
            GatesError: They do not fit; the old ones stay.
        """
        ...

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Weigh adapters; others keep their strength.

        Raises:
            GatesError: There is no adapter of a name, or a strength is not finite.
        """
        ...

    def at(self, step: int, steps: int) -> None:
        """Learn which denoising step follows.

        A pipeline calls this before each step, such as from ``callback_on_step_end`` with the
        number of the next one. Where it is never called, the run has one step.

        Args:
            step: Its number, from 0.
            steps: Number of steps of the run.
        """
        ...
