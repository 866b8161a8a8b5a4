"""The command line of an application."""

from harness.command.cli import GatesRunCLI
from harness.command.trainer import GatesRunTrainer

__all__ = ["GatesRunCLI", "GatesRunTrainer"]
