"""Lightning's Trainer with loops that resume bit for bit, random generators included."""

import csv
import io
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _ResultCollection,
    _ResultMetric,
)
from lightning.pytorch.trainer.trainer import Trainer
from torch import Tensor

from core_gates.errors import GatesError
from harness.files.atomic import write_text

NO_GAUSS = torch.nan  # stands for python's "no second normal deviate kept"


def capture_random_state() -> dict[str, Tensor]:
    """State of the generators of python, numpy, torch and the process's CUDA device.

    Returns:
        Tensors of fixed shape, safe to load with ``weights_only=True``: ``python`` (626,) and
        ``numpy`` (627,) int64, ``python_gauss`` (1,) float64, ``torch`` and ``cuda`` uint8.
    """
    version, words, gauss = random.getstate()
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([NO_GAUSS if gauss is None else gauss], dtype=torch.float64),
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Set every generator to a state of `capture`; that of an absent GPU is left out."""
    version, *words = states["python"].tolist()
    gauss = float(states["python_gauss"])
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    _set_numpy_state(states["numpy"].cpu().numpy())
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def gather_random_states(states: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of all ranks, in order of rank; every rank must call it."""
    of_rank = {name: state.cpu() for name, state in states.items()}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [of_rank]
    ranks: list[dict[str, Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(ranks, of_rank)
    return ranks


def _numpy_state() -> Tensor:
    state = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator is meant)
    key, position = state["state"]["key"], state["state"]["pos"]
    gauss = np.array([state["gauss"]], dtype=np.float64).view(np.int64)
    words = [key.astype(np.int64), np.array([position, state["has_gauss"]]), gauss]
    return torch.from_numpy(np.concatenate(words))


def _set_numpy_state(words: np.ndarray) -> None:
    np.random.set_state(  # noqa: NPY002 (the global generator is meant)
        {
            "bit_generator": "MT19937",
            "state": {"key": words[:624].astype(np.uint32), "pos": int(words[624])},
            "has_gauss": int(words[625]),
            "gauss": float(words[626:627].view(np.float64)[0]),
        }
    )


class ResumableCSVLogger(Logger):
    """Write ``metrics.csv``, one row per call, flushed at once.

    Lightning's own CSV logger deletes the file when a run is resumed. This one keeps the rows that
    belong to the checkpoint (see `truncate`) and appends, so that an interrupted training
    leaves the same bytes as an uninterrupted one. Columns are sorted; a new one rewrites the file.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self.num_rows = 0
        self._columns: list[str] | None = None  # None: the file has not been opened yet

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.name

    @property
    def version(self) -> str:
        """A run folder has one version."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self.folder)

    @property
    def experiment(self) -> Any:
        """The logger itself, which needs no outside service."""
        return self

    def truncate(self, num_rows: int) -> None:
        """Keep the first ``num_rows`` rows of the file and continue after them."""
        self.num_rows = num_rows
        self._columns = None

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: Scalars by name.
            step: Optimizer steps done before this one.
        """
        if self._columns is None:
            self._open()
        row = {name: float(value) for name, value in metrics.items()}
        row["step"] = self.num_rows if step is None else step
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        assert self._columns is not None
        if new := set(row) - set(self._columns):
            rows = self._read()
            self._columns = sorted({*self._columns, *new})
            self._rewrite(rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_csv([row], self._columns, header=False))
        self.num_rows += 1

    def _open(self) -> None:
        rows = self._read()[: self.num_rows]
        self.num_rows = len(rows)
        self._columns = sorted({name for row in rows for name, value in row.items() if value})
        self._rewrite(rows)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        write_text(self.path, _csv(rows, self._columns, header=True))


def _csv(rows: list[dict[str, Any]], columns: list[str], *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


States = dict[str, Tensor]


class StepCallback:
    """What a callback inherits to be told that everything of a step is done and may be saved."""

    def on_step_complete(self, trainer: Trainer) -> None:
        """Called between two steps, after validation and logging, and after an epoch."""


class EpochMeans(_ResultCollection):
    """What ``self.log(..., on_epoch=True)`` summed up in this epoch, which Lightning forgets."""

    def __init__(self) -> None:
        super().__init__(training=True)
        self.resumed: States = {}

    def __setitem__(self, key: str, metric: _ResultMetric) -> None:
        """Register a metric at its first value and hand it what it had summed up before."""
        super().__setitem__(key, metric)
        for name in ("value", "cumulated_batch_size"):
            if (sum_so_far := self.resumed.pop(f"{key}:{name}", None)) is not None:
                setattr(metric, name, sum_so_far)

    def sums(self) -> States:
        """The sums of this epoch; empty sums are left out."""
        states: States = {}
        for key, metric in self.items():
            if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset:
                states[f"{key}:value"] = metric.value
                if metric.meta.is_mean_reduction:
                    states[f"{key}:cumulated_batch_size"] = metric.cumulated_batch_size
        return states

    def resumable(self) -> bool:
        """False while a torchmetrics object accumulates, whose state is its module's own."""
        return all(m.is_tensor or not m.meta.on_epoch or m.has_reset for m in self.values())


class ExactEpochLoop(_TrainingEpochLoop):
    """An epoch that reports complete steps, and whose stream of batches can be replayed."""

    def __init__(self, trainer: Trainer, min_steps: int | None, max_steps: int) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self._results = self.means = EpochMeans()
        self.epoch_start: States = {}  # random states before the loader drew its order
        self.resumed: dict[str, list[States]] | None = None

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Add the random states and the sums of the epoch, of every rank."""
        state = super().on_save_checkpoint()
        state["exact"] = {
            "random": gather_random_states(capture_random_state()),
            "epoch_start": gather_random_states(self.epoch_start),
            "sums": gather_random_states(self.means.sums()),
        }
        return state

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Keep them until the loader is there."""
        super().on_load_checkpoint(state_dict)
        self.resumed = state_dict.get("exact")

    def own(self, part: str) -> States | None:
        """A part of the resumed state; None if this rank did not exist in the saved run."""
        ranks = (self.resumed or {}).get(part, [])
        return ranks[self.trainer.global_rank] if self.trainer.global_rank < len(ranks) else None

    def before_first_iteration(self) -> None:
        """Called when the loaders are built and draw their order next."""
        state = self.own("epoch_start" if self.restarting else "random")
        if state:
            restore_random_state(state)
        self.epoch_start = capture_random_state()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Begin the stream of batches, or bring it to where the checkpoint was written."""
        epoch, fit_loop = self.trainer.current_epoch, self.trainer.fit_loop
        assert isinstance(fit_loop, ExactFitLoop)
        if epoch > 0 and not fit_loop.is_resuming and not self.restarting:
            self.epoch_start = capture_random_state()
        self.means.resumed = {}
        super().on_run_start(data_fetcher)
        if self.resumed is None:
            return
        if self.restarting:
            self.means.resumed = dict(self.own("sums") or {})
            self._replay(data_fetcher)
            if state := self.own("random"):
                restore_random_state(state)
        elif state := fit_loop.after_first_iteration:
            restore_random_state(state)
        self.resumed = None

    def _replay(self, data_fetcher: _DataFetcher) -> None:
        if all(isinstance(loader, _Stateful) for loader in data_fetcher.combined_loader.flattened):
            return
        seen = self.batch_progress.current.ready
        data_fetcher.fetched = 0
        for number in range(seen):
            try:
                next(data_fetcher)
            except StopIteration as error:
                raise GatesError(
                    f"the checkpoint was written after {seen} batches of an epoch, but the data "
                    f"has {number}: resume with the run's data, or start again with --overwrite"
                ) from error

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Run one step; nothing of the step before the checkpoint is left to be made up for."""
        if self._restarting and self.restarted_on_last:
            self.restarting = False
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate and log, then tell the callbacks; at the last batch the epoch's end does so."""
        super().on_advance_end(data_fetcher)
        between = not (self._should_accumulate() or self._num_ready_batches_reached())
        if between and self.means.resumable():
            _tell(self.trainer)


class ExactFitLoop(_FitLoop):
    """A training that reports complete epochs and, once resumed at one, begins the next."""

    def __init__(self, trainer: Trainer, min_epochs: int | None, max_epochs: int | None) -> None:
        super().__init__(trainer, min_epochs, max_epochs)
        self.after_first_iteration: States | None = None

    @property
    def restarting(self) -> bool:
        """Whether the next epoch continues one that the checkpoint was written in."""
        return bool(self._restarting)

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        resumed = (
            isinstance(self.epoch_loop, ExactEpochLoop) and self.epoch_loop.resumed is not None
        )
        current = self.epoch_progress.current
        if restarting and resumed:
            self.trainer.num_sanity_val_steps = 0
            self._restarting = current.ready != current.completed
            self.epoch_loop.restarting = self._restarting
        else:
            _FitLoop.restarting.fset(self, restarting)

    def _load_combined_loader_states(self) -> None:
        super()._load_combined_loader_states()
        assert isinstance(self.epoch_loop, ExactEpochLoop)
        self.epoch_loop.before_first_iteration()

    def setup_data(self) -> None:
        """Build the loaders and remember the random states after they drew their first order."""
        first = self._combined_loader is None
        super().setup_data()
        if first:
            self.after_first_iteration = capture_random_state()
        elif self._combined_loader_states_to_load and self.restarting:
            # A learning rate schedule asked for the number of steps before the states were read.
            super()._load_combined_loader_states()
            iter(self._data_fetcher)  # type: ignore[arg-type]

    def on_advance_end(self) -> None:
        """Finish the epoch, then tell the callbacks, unless it was cut short by ``max_steps``."""
        whole = self.epoch_loop._num_ready_batches_reached()
        super().on_advance_end()
        if whole:
            _tell(self.trainer)


def _tell(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StepCallback):
            callback.on_step_complete(trainer)


class ExactTrainer(Trainer):
    """A Trainer whose killed and resumed training ends with the bits of an uninterrupted one.

    It is to be resumed from what `harness.runs.callbacks.RunCheckpoint` writes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        steps = self.fit_loop.epoch_loop
        self.fit_loop = ExactFitLoop(self, self.fit_loop.min_epochs, self.fit_loop.max_epochs)
        self.fit_loop.epoch_loop = ExactEpochLoop(self, steps.min_steps, steps.max_steps)
