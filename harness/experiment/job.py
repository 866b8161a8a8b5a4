"""What a piece of work may use: a folder that survives a kill, a training run that resumes."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping

from core_gates.errors import GatesError
from harness.experiment.store import Form, Store
from harness.files import remove, replacing
from harness.files.atomic import locked
from harness.files.piece import Piece, Record, gap, read_record
from harness.runs.callbacks import RunCheckpoint, continuing, load_checkpoint, starting_from
from harness.runs.loops import ExactTrainer, capture_random_state, restore_random_state
from harness.runs.processes import Tick
from harness.runs.terminal import quiet_lightning

R = TypeVar("R")
SAVED_EVERY = 60.0  # seconds of steps that a kill may cost
SAVED_STEPS = 100  # steps that it may cost on several ranks, which would not agree on the time
DONE = "done"
QUIET = {
    "accelerator": "auto",
    "devices": 1,
    "logger": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "num_sanity_val_steps": 0,
}
"""Arguments of the Trainer of a piece of work, unless others are given."""


class Job:
    """What a piece of work may use.

    Args:
        folder: Survives a kill, and goes when the result is whole.
        tick: To be called as the work proceeds.
        first: Folder of the first rank, where this one is another that takes part in the training
            and keeps nothing.

    Attributes:
        objects: Short hashes of what was trained on.
        facts: Other fields of the record.
        last: Checkpoint of the end of the last training, with the state of its optimizers; None
            before the first one.
    """

    def __init__(
        self,
        folder: Path,
        tick: Callable[[], None] = lambda: None,
        *,
        first: Path | None = None,
    ) -> None:
        self.folder, self.tick, self.first = folder, tick, first
        self.objects: set[str] = set()
        self.facts: dict[str, Any] = {}
        self.last: Path | None = None
        self._fits = 0

    def note(self, *, objects: Iterable[str] = (), **facts: Any) -> None:
        """Keep for the record what was trained on, and other facts."""
        self.objects |= set(objects)
        self.facts |= facts

    def part(self, name: str, form: Form[R], make: Callable[[], R]) -> R:
        """Return a part of the result, which a killed attempt may have made already.

        Args:
            name: Of the part, different from that of every other one.
            form: How it is saved.
            make: Makes the part; it has to seed itself.

        Raises:
            GatesError: What was saved is damaged; or what ``make`` raises.
        """
        folder = self.folder / f"part-{name}"
        if folder.is_dir():
            return form.load(folder)
        made = make()
        with replacing(folder) as temporary:
            temporary.mkdir()
            form.save(temporary, made)
        return made

    def fit(
        self,
        module: L.LightningModule,
        data: L.LightningDataModule,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int | None = None,
        ticks: Literal["epochs", "steps"] = "epochs",
        **trainer: Any,
    ) -> L.LightningModule:
        """Train a module, from the last checkpoint of a killed attempt where there is one.

        The result has the same bits as that of an uninterrupted one. Several ranks train together;
        the first one writes checkpoints, and says what the others start from.

        Args:
            module: Is trained in place.
            data: What it is trained on.
            monitor: Logged validation score of the weights that are returned; the last weights
                when None.
            mode: Whether the score is to be small or large.
            patience: Validations without a better score after which the training ends.
            ticks: What it ticks after: each epoch, or each step.
            trainer: Arguments of the Trainer; callbacks and plugins are objects, or settings
                with a ``class_path``.

        Returns:
            The module in evaluation mode.

        Raises:
            GatesError: A class does not exist or refuses an argument, or a checkpoint is damaged.
        """
        quiet_lightning()
        folder = (self.first or self.folder) / f"fit{self._fits}"
        self._fits += 1
        if self.first is None:
            folder.mkdir(parents=True, exist_ok=True)
        every: dict[str, Any] = {"every_n_steps": None, "every_seconds": SAVED_EVERY}
        keeper = RunCheckpoint(monitor=monitor, mode=mode, folder=str(folder), **every)
        callbacks = [_Ticks(self.tick, ticks), _SameDraws(), *_stopping(monitor, mode, patience)]
        fixed: dict[str, Any] = {**QUIET, "default_root_dir": folder}
        last, best, done = folder / "last.ckpt", folder / "best.ckpt", folder / DONE
        self.last = last
        fitter = _trainer_of({**fixed, **trainer}, [*callbacks, keeper])
        if fitter.world_size > 1:
            keeper.every_n_steps, keeper.every_seconds = SAVED_STEPS, None
        start = DONE if done.is_file() else str(last) if last.is_file() else None
        start = _agreed(fitter, module, start)
        again = f"delete {folder} to start again"
        if start != DONE:
            with continuing(start, again):
                fitter.fit(module, data, ckpt_path=start, weights_only=True)
        if self.first is not None:
            return module.eval()
        done.touch()
        checkpoint = best if best.is_file() else last
        with starting_from(checkpoint, again):
            module.load_state_dict(load_checkpoint(checkpoint, again)["state_dict"])
        return module.eval()


def _stopping(
    monitor: str | None, mode: Literal["min", "max"], patience: int | None
) -> list[Callback]:
    """Return the early-stopping callbacks, for a score that no longer improves."""
    if patience is None:
        return []
    if monitor is None:
        raise ValueError("patience needs a monitor: name a logged validation score")
    return [EarlyStopping(monitor, mode=mode, patience=patience)]


def _agreed(fitter: L.Trainer, module: L.LightningModule, start: str | None) -> str | None:
    """Return where the first rank starts, for all ranks that began at the same time.

    Processes that Lightning starts itself begin when the first one has found its start.
    """
    strategy = fitter.strategy
    environment = getattr(strategy, "cluster_environment", None)
    if fitter.world_size == 1 or isinstance(environment, LightningEnvironment):
        return start
    strategy.connect(module)
    strategy.setup_environment()
    return strategy.broadcast(start)


def _trainer_of(options: dict[str, Any], callbacks: list[Callback]) -> ExactTrainer:
    """Return a Trainer; callbacks and plugins of the options become objects."""
    all_callbacks = [*_made(options.pop("callbacks", None)), *callbacks]
    plugins = _made(options.pop("plugins", None)) or None
    return ExactTrainer(**options, plugins=plugins, callbacks=all_callbacks)


def _made(given: Any) -> list[Any]:
    """Return objects of the Trainer from settings, of one or several; objects as they are."""
    listed = given if isinstance(given, list | tuple) else [given] if given else []
    return [_one_made(entry) for entry in listed]


def _one_made(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    path = str(given.get("class_path"))
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)(**(given.get("init_args") or {}))
    except (ImportError, AttributeError, TypeError, ValueError, MisconfigurationException) as error:
        raise GatesError(f"{path} cannot be made for the Trainer: {error}") from error


class _SameDraws(Callback):
    """Draw on several ranks what one process would draw, where Lightning seeds them again."""

    def __init__(self) -> None:
        self.states = capture_random_state()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take up the random states that the training was begun with."""
        if trainer.world_size > 1:
            restore_random_state(self.states)


class _Ticks(Callback):
    """Call a function after every epoch, or every step."""

    def __init__(self, tick: Callable[[], None], after: Literal["epochs", "steps"]) -> None:
        self.tick, self.after = tick, after

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tick."""
        if self.after == "epochs":
            self.tick()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Tick."""
        if self.after == "steps":
            self.tick()


@contextmanager
def claimed(folder: Path, piece: Piece) -> Iterator[Path]:
    """Yield the partial folder ``.NAME.partial`` of a piece, which no other process uses.

    A partial folder of another record is started from scratch. It is left as it is after an
    exception, and deleted when the block succeeds.

    Raises:
        GatesError: Another process is at work on the piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f".{piece.name}.lock", piece):
        partial = partial_of(folder, piece)
        if partial.exists() and gap(read_record(partial), piece):
            remove(partial)
        partial.mkdir(exist_ok=True)
        if read_record(partial) is None:
            Record.of(piece).write(partial)
        yield partial
        remove(partial)


def partial_of(folder: Path, piece: Piece) -> Path:
    """Return where the work on a piece keeps what survives a kill."""
    return folder / f".{piece.name}.partial"


def sweep(folder: Path, piece: Piece) -> None:
    """Remove the partial folder of a whole piece, left by a process killed at the last moment."""
    partial = partial_of(folder, piece)
    if partial.exists():
        with suppress(GatesError), _locked(folder / f".{piece.name}.lock", piece):
            remove(partial)


def _locked(path: Path, piece: Piece) -> AbstractContextManager[None]:
    """Hold the lock of a piece, which is released when the process ends, in any way."""
    return locked(path, path.parent / piece.name, "give --name NEW")


Work = Callable[[Piece, Job], R]


def compute(
    store: Store[Any],
    work: Work[Any],
    revision: str | None,
    piece: Piece,
    length: int,
    *,
    tick: Tick,
) -> None:
    """Compute the result of a piece and keep it; an error names the piece.

    It ticks ``length`` times at least, also where the work ends early or is done already.
    """
    done = 0

    def counted() -> None:
        nonlocal done
        done += 1
        tick()

    _compute_one(store, work, revision, piece, counted)
    for _ in range(done, length):
        tick()


def take_part(store: Store[Any], missing: Sequence[Piece], work: Work[Any]) -> list[Piece]:
    """Train on a rank that is not the first one, which keeps the results; return none."""
    for piece in missing:
        with TemporaryDirectory() as temporary:
            work(piece, Job(Path(temporary), first=partial_of(store.folder, piece)))
    return []


def _compute_one(
    store: Store[Any], work: Work[Any], revision: str | None, piece: Piece, tick: Tick
) -> None:
    begin = time.monotonic()
    try:
        with claimed(store.folder, piece) as folder:
            if store.find(piece) is not None:  # made by another process in the meantime
                return
            job = Job(folder, tick)
            result = work(piece, job)
            seconds = round(time.monotonic() - begin, 1)
            store.keep(
                piece, result, objects=job.objects, seconds=seconds, revision=revision, **job.facts
            )
    except GatesError as error:
        raise type(error)(f"{piece.name}: {error}") from error
    except Exception as error:
        error.add_note(f"while working on {store.kind}/{piece.name}")
        raise
