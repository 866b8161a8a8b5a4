"""What a piece of work is given: a job that survives a kill, and the machine that it runs on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import lightning as L

from core_gates.errors import GatesError, check_option

R = TypeVar("R")
Strategy = Literal["ddp", "fsdp2"]


class Form(Protocol[R]):
    """Saves a result into a folder and loads it from there."""

    def save(self, folder: Path, result: R) -> None:
        """Write a result into an empty folder."""

    def load(self, folder: Path) -> R:
        """Read what `save` wrote."""


class Job(Protocol):
    """What a piece of work may use, such as `harness.experiment.Job`.

    Attributes:
        folder: Survives a kill, and goes when the result is whole.
        tick: To be called as the work proceeds.
    """

    folder: Path
    tick: Callable[[], None]

    def note(self, **facts: Any) -> None:
        """Keep what was trained on (``objects``), and other facts, for the record."""

    def part(self, name: str, form: Form[R], make: Callable[[], R]) -> R:
        """Return a part of the result, which a killed attempt may have made already."""

    def fit(self, module: L.LightningModule, data: L.LightningDataModule, **options: Any) -> Any:
        """Train a module, from the last checkpoint of a killed attempt where there is one."""


def refuse_below(least: int, **numbers: int | None) -> None:
    """Refuse numbers that are too small.

    Raises:
        GatesError: One is.
    """
    for name, number in numbers.items():
        if number is not None and number < least:
            raise GatesError(f"--{name} is {number}, expected {least} or more")


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
        check_option("strategy", self.strategy, get_args(Strategy), GatesError)

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


ONE = Machine()  # one process
