"""Callbacks of every run: its progress, and the checkpoints that it keeps."""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from core_gates.errors import GatesError
from harness.runs.loops import ResumableCSVLogger, StepCallback
from harness.runs.terminal import timed


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
        self._last, self._begin, self._first, self._total = 0.0, 0.0, 0, torch.inf
        self.is_enabled = True

    def disable(self) -> None:
        """Print nothing; Lightning calls it on every rank but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """Print again."""
        self.is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when and where the training begins, and at which step it ends."""
        self._begin, self._first = time.monotonic(), trainer.global_step
        self._total = trainer.estimated_stepping_batches

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
        if not self.is_enabled:
            return
        scores = _scores(self.get_metrics(trainer, pl_module))
        shown = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in scores.items()
        )
        done, all_steps = trainer.global_step - self._first, self._total - self._first
        time_left = timed(done, all_steps, self._last - self._begin)
        of = f" of {self._total}  {time_left}" if all_steps < torch.inf else ""
        place = f"epoch {trainer.current_epoch}  step {trainer.global_step}{of}"
        print(f"{place}  {shown}".rstrip(), flush=True)


LIGHTNING_KEYS = {"pytorch-lightning_version", "state_dict"}
OBJECTS = "objects"
"""Key of a callback's state: short hashes of what a checkpoint was trained on."""


class RunCheckpoint(Checkpoint, StepCallback):
    """Write ``checkpoints/last.ckpt`` every few steps and ``best.ckpt`` when a score improves.

    Both are written between two steps (see `harness.runs.loops`) and atomically: a killed run
    has either the old file or the new one. The log is flushed first, and its length is stored.

    Args:
        every_n_steps: Optimizer steps between two writes of ``last.ckpt``; the end of the
            training is always written. None leaves it to ``every_seconds``.
        monitor: Logged validation score that decides on ``best.ckpt``; None keeps no best.
        mode: Whether the score is to be small (``min``) or large (``max``).
        folder: Where to write; ``checkpoints`` in the Trainer's ``default_root_dir`` when None.
        every_seconds: Seconds between two writes; None leaves it to ``every_n_steps``. One
            process only: ranks would not agree on the time.

    Raises:
        ValueError: ``every_n_steps`` is not positive.
        GatesError: ``monitor`` is not among the logged scores.
    """

    def __init__(
        self,
        every_n_steps: int | None = 100,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        folder: str | None = None,
        every_seconds: float | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps must be at least 1, found {every_n_steps}")
        self.every_n_steps, self.folder = every_n_steps, folder
        self.every_seconds, self._saved_at = every_seconds, time.monotonic()
        self.monitor, self.mode = monitor, mode
        self.saved_step = 0
        self.best_score: float | None = None
        self._best_due = False

    def state_dict(self) -> dict[str, Any]:
        """The step of the last write and the best score."""
        return {"saved_step": self.saved_step, "best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last write and the best score."""
        self.saved_step, self.best_score = state_dict["saved_step"], state_dict["best_score"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store how many rows of the log belong to the saved state."""
        log = _log(trainer)
        checkpoint["log_rows"] = log.num_rows if log else 0

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Cut the log back to the saved state."""
        log = _log(trainer)
        if log and trainer.state.fn == TrainerFn.FITTING:
            log.truncate(checkpoint.get("log_rows", 0))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the score with the best one; the file is written when the step is complete."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            raise GatesError(
                f"checkpoint.monitor {self.monitor!r} is not logged; "
                f"logged are {', '.join(sorted(trainer.callback_metrics)) or 'no scores'}"
            )
        score = float(trainer.callback_metrics[self.monitor])
        best = self.best_score
        better = best is None or (score < best if self.mode == "min" else score > best)
        if trainer.strategy.broadcast(better and score == score):
            self.best_score, self._best_due = score, True

    def on_step_complete(self, trainer: Trainer) -> None:
        """Write what is due."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step, best_due = trainer.global_step, self._best_due
        if not (best_due or self._is_due(step) or _ends(trainer)):
            return
        self._best_due = False
        self.saved_step = step
        for logger in trainer.loggers:
            logger.save()
        folder = Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")
        temporary = folder / ".saving.ckpt"
        try:
            trainer.save_checkpoint(temporary, weights_only=False)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if trainer.is_global_zero:
            if best_due:
                copy = folder / ".best.ckpt"
                shutil.copyfile(temporary, copy)
                copy.replace(folder / "best.ckpt")
            temporary.replace(folder / "last.ckpt")
        self._saved_at = time.monotonic()

    def _is_due(self, step: int) -> bool:
        """Return whether that many steps or seconds have passed since the last write."""
        seconds = time.monotonic() - self._saved_at
        steps_passed = (
            self.every_n_steps is not None and step - self.saved_step >= self.every_n_steps
        )
        return steps_passed or (self.every_seconds is not None and seconds >= self.every_seconds)


def load_weights(path: Path, advice: str = "give another") -> dict[str, Any]:
    """Read a checkpoint without executing anything that it holds.

    Args:
        path: Its file.
        advice: What to do where it is damaged.

    Raises:
        GatesError: There is none, or it is not one.
    """
    if not path.is_file():
        raise GatesError(f"no checkpoint at {path}: run fit first, or give --ckpt_path")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        kind = type(error).__name__
        raise GatesError(f"{path} is damaged or not a checkpoint ({kind}): {advice}") from error


def load_checkpoint(path: Path, advice: str) -> dict[str, Any]:
    """Read a checkpoint of a training run.

    Args:
        path: Its file.
        advice: What to do where it is none.

    Raises:
        GatesError: It is damaged, or something else.
    """
    content = load_weights(path, advice)
    if LIGHTNING_KEYS - content.keys():
        raise GatesError(f"{path} is not a checkpoint of a training run: {advice}")
    return content


@contextmanager
def starting_from(path: str | Path | None, advice: str) -> Iterator[None]:
    """Refuse a checkpoint of another network than the block loads it into.

    Args:
        path: The checkpoint; None for none.
        advice: What to do instead.

    Raises:
        GatesError: It is.
    """
    try:
        yield
    except RuntimeError as error:
        if not path or "Error(s) in loading state_dict" not in str(error):
            raise
        first = shorten(" ".join(str(error).splitlines()[1:2]), 200, placeholder=" ...")
        raise GatesError(f"{path} is a checkpoint of another network: {first}; {advice}") from error


@contextmanager
def continuing(path: str | Path | None, advice: str) -> Iterator[None]:
    """Refuse files that `load_checkpoint` and `starting_from` refuse.

    Raises:
        GatesError: It is damaged, something else, or of another network.
    """
    if path is not None:
        load_checkpoint(Path(path), advice)
    with starting_from(path, advice):
        yield


def seen(checkpoint: Mapping[str, Any]) -> set[str]:
    """Return short hashes of all that a checkpoint was trained on, that of its start included."""
    states = checkpoint.get("callbacks", {}).values()
    return {name for state in states for name in state.get(OBJECTS, ())}


def _log(trainer: Trainer) -> ResumableCSVLogger | None:
    return next((log for log in trainer.loggers if isinstance(log, ResumableCSVLogger)), None)


def _ends(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    steps_done = loop.max_steps != -1 and trainer.global_step >= loop.max_steps
    epochs = loop.max_epochs
    epochs_done = epochs is not None and epochs != -1 and trainer.current_epoch >= epochs
    return bool(trainer.should_stop or steps_done or epochs_done)
