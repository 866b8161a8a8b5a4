"""Progress: a bar on a terminal, plain lines in a file or pipe."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


def progress_bar() -> ProgressBar:
    """The progress bar that suits the standard output."""
    return TerminalProgress(leave=True) if sys.stdout.isatty() else PlainProgress()


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """Lightning adds a version number that a run folder does not have."""
    return {name: value for name, value in metrics.items() if name != "v_num"}


class TerminalProgress(RichProgressBar):
    """Lightning's bar with the scores of the module alone."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The scores logged with ``prog_bar=True``."""
        return _scores(super().get_metrics(trainer, pl_module))


class PlainProgress(ProgressBar):
    """Print a line a few times a minute and after each validation.

    Args:
        seconds: Least time between two lines of one epoch.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._last = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Print nothing; Lightning calls it on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print at most one line in ``seconds``."""
        if time.monotonic() - self._last >= self.seconds:
            self._print(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the scores."""
        if not trainer.sanity_checking:
            self._print(trainer, pl_module)

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.monotonic()
        if not self._enabled:
            return
        scores = _scores(self.get_metrics(trainer, pl_module))
        shown = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in scores.items()
        )
        place = f"epoch {trainer.current_epoch}  step {trainer.global_step}"
        print(f"{place}  {shown}".rstrip(), flush=True)
