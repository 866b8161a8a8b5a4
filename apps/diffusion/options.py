"""Options that several training runs share."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from core_gates.errors import GatesError, check_option

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Strategy = Literal["ddp", "fsdp2"]
STRATEGIES = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Machine:
    """Where a training runs.

    Attributes:
        accelerator: What computes, such as ``cpu`` or ``gpu``; ``auto`` takes what there is.
        devices: Processes on this machine, with a device each.
        num_nodes: Machines that take part.
        strategy: How processes share the work: ``ddp``, each with the whole model, or ``fsdp2``,
            each with a part of the frozen model; it decides nothing for one process.
        checkpointing: Compute activations again in the backward pass, which saves memory.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Strategy = "ddp"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: There is no process, or no such strategy.
        """
        refuse_below(1, devices=self.devices, num_nodes=self.num_nodes)
        check_option("strategy", self.strategy, STRATEGIES, GatesError)

    @property
    def processes(self) -> int:
        """On all machines together."""
        return self.devices * self.num_nodes

    def trainer(self) -> dict[str, Any]:
        """Return arguments of the Trainer, without the strategy of several processes."""
        return {
            "accelerator": self.accelerator,
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            "use_distributed_sampler": False,
        }

    def check_share(self, batch_size: int) -> None:
        """Refuse a batch that processes cannot share equally.

        Raises:
            GatesError: They cannot.
        """
        if batch_size % self.processes:
            raise GatesError(
                f"--batch_size {batch_size} cannot be shared equally by {self.processes} processes:"
                f" give a multiple of {self.processes}"
            )


def refuse_below(least: int, **numbers: int | None) -> None:
    """Refuse numbers that are too small.

    Raises:
        GatesError: One is.
    """
    for name, number in numbers.items():
        if number is not None and number < least:
            raise GatesError(f"--{name} is {number}, expected {least} or more")


def refuse_unless_positive(**numbers: float | None) -> None:
    """Refuse numbers that are not positive and finite.

    Raises:
        GatesError: One is not.
    """
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise GatesError(f"--{name} is {number}, expected a positive number")


def refuse_unless_share(**numbers: float) -> None:
    """Refuse numbers that are not a fraction.

    Raises:
        GatesError: One does not lie from 0 to below 1.
    """
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise GatesError(f"--{name} is {number}, expected a fraction from 0 to below 1")


def refuse_unless_text(prompt: str) -> None:
    """Refuse a prompt that is not in UTF-8, which no text encoder takes.

    Raises:
        GatesError: There are some.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise GatesError(
            f"the prompt is not in UTF-8 at letter {error.start + 1}: write it in UTF-8"
        ) from error


ONE = Machine()  # one process
