"""Names of the room, each with its file."""

from .cli import GatesRunCLI as GatesRunCLI
from .trainer import GatesRunTrainer as GatesRunTrainer
