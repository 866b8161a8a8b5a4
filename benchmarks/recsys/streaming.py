"""Millions of rows through shards: their writing, one pass in bounded memory, and three kills."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from apps.video.comparison import Study
from apps.video.training_verbs import base_rates_of
from core_gates.errors import GatesError, check_at_least
from harness.evidence import Bar, Row
from harness.experiment import Figures, Job, Piece, Run
from harness.files import remove, write_json, write_text
from harness.runs.callbacks import load_weights
from harness.runs.folder import RunFolder
from harness.system import MemoryMeter, dependent, resident
from recsys.experiments import Contest, data_of, nested, source_of, summed_log_loss_of
from video_multitask.sources.simulated import SimulatedStream
from video_multitask.stream.parquet_stream import ParquetStream
from video_multitask.stream.shards import MANIFEST

POLL = 0.01  # seconds
SAMPLED = 0.25  # seconds between two samples of memory, and two notes of what was spent
SPENT = ".spent.json"
PROGRAM = ("-m", "apps.main")
GROUPS = ("model", "data", "trainer", "checkpoint")
FEED, KIND = "feed", "figures"
FOLDER = "data.source.init_args.folder"
SHOWN = (
    "rows_per_minute", "size_mb", "peak_mb", "rows_trained", "val_loss", "kills",
    "losses_compared", "losses_that_differ", "tensors_that_differ",
)  # fmt: skip
FIXED = {"trainer.accelerator": "cpu", "trainer.num_sanity_val_steps": 0}
MOST_MB, LEAST_PER_MINUTE = 1500.0, 1e6
BYTES = 1e6  # of a MB


class Ended(NamedTuple):
    """How a training has ended.

    Attributes:
        seconds: That it took, with all killed attempts that it continues.
        peak: Most bytes in memory in any of them, see `harness.system.resident`.
        killed: Whether it was killed from here.
    """

    seconds: float
    peak: int
    killed: bool


class ChildFit:
    """A training of the network of some settings, with its own run folder.

    Args:
        settings: Of the run, by dotted name.
        changes: Settings that differ.
        root: Folder of its run folder and configuration.
        name: Of the run folder.
        threads: Threads of each of its processes.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        changes: Mapping[str, Any],
        root: Path,
        name: str,
        threads: int = 1,
    ) -> None:
        self.folder = RunFolder("video", name, root)
        self.threads = threads
        wanted = {**settings, **changes}
        wanted.pop("data.seed", None)  # follows seed_everything
        content: dict[str, Any] = {group: nested(wanted, f"{group}.") for group in GROUPS}
        content["seed_everything"] = settings.get("seed", 0)
        self.config = write_text(root / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False))

    def run(self, stop: Callable[[], bool] = lambda: False) -> Ended:
        """Train, from the last checkpoint where there is one, and wait for the end.

        Args:
            stop: Asked again and again; the process is killed by SIGKILL once it returns true.

        Raises:
            GatesError: The training failed.
        """
        log, (spent, peak) = self.config.with_suffix(".log"), self._spent()
        begin = sampled = time.monotonic()
        killed = False
        with log.open("wb") as output:
            process = self._started(output)
            try:
                while process.poll() is None:
                    if time.monotonic() - sampled > SAMPLED:
                        peak, sampled = max(peak, resident(process.pid)), time.monotonic()
                        self._note(spent + sampled - begin, peak)
                    if stop():
                        killed = process.poll() is None
                        break
                    time.sleep(POLL)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode and not killed:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise GatesError(f"the training of {self.config} failed: {' '.join(last)}; see {log}")
        seconds = spent + time.monotonic() - begin
        self._note(seconds, peak)
        return Ended(seconds, peak, killed)

    def losses(self) -> dict[int, str]:
        """Return the logged training loss of each step, as it is written."""
        return {int(row["step"]): row["train/loss"] for row in self.rows() if row["train/loss"]}

    def rows(self) -> list[dict[str, str]]:
        """Return the log."""
        path = self.folder.metrics
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("step")]

    def logged(self) -> int:
        """Return the number of rows of the log, that of a line being written included."""
        path = self.folder.metrics
        return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0

    def log_file(self) -> int:
        """Return the number of the file of the log, another after a resume; 0 before the first."""
        path = self.folder.metrics
        return path.stat().st_ino if path.is_file() else 0

    def _spent(self) -> tuple[float, int]:
        """Return seconds and peak of the attempts that are continued."""
        path = self.config.with_suffix(SPENT)
        if not (self.folder.exists() and path.is_file()):
            return 0.0, 0
        spent = json.loads(path.read_text(encoding="utf-8"))
        return float(spent["seconds"]), int(spent["peak"])

    def _note(self, seconds: float, peak: int) -> None:
        """Keep what was spent so far, for an attempt after a kill of this process, too."""
        write_json(self.config.with_suffix(SPENT), {"seconds": seconds, "peak": peak})

    def _started(self, output: Any) -> subprocess.Popen[bytes]:
        words = ["video", "fit", "--config", str(self.config)]
        words += ["--root", str(self.config.parent), "--name", self.folder.name]
        words += ["--resume"] if self.folder.exists() else []
        threads = {"OMP_NUM_THREADS": str(self.threads), "POLARS_MAX_THREADS": str(self.threads)}
        return subprocess.Popen(
            dependent([sys.executable, *PROGRAM, *words]),
            env={**os.environ, **threads},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers are killed with it
        )


class StreamStudy(Study):
    """Writes simulated shards, trains one pass over them, and kills a training again and again.

    The training runs are separate processes of ``gates video fit``, with the workers of the
    configuration. Memory is that of the training process and the proportional set size of its
    workers, see `harness.system.resident`. Training is killed by SIGKILL, workers
    included, and resumed; every logged loss and every bit of the last checkpoint must be those of a
    training that was left alone.

    Args:
        prefix_steps: Steps of the training runs that are killed.
        kills: How often.
        saved_every: Steps between their checkpoints.
        threads: Threads of each process.
        most_mb: Bar for the memory, in 10^6 bytes.
        rows_per_minute: Bar for the writing.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(
        self,
        prefix_steps: int = 40,
        kills: int = 3,
        saved_every: int = 3,
        threads: int = 1,
        most_mb: float = MOST_MB,
        rows_per_minute: float = LEAST_PER_MINUTE,
    ) -> None:
        check_at_least(1, kills=kills, saved_every=saved_every, threads=threads)
        check_at_least(4 * (kills + 1), prefix_steps=prefix_steps)
        self.prefix_steps, self.kills, self.saved_every = prefix_steps, kills, saved_every
        self.threads, self.most_mb, self.rows_per_minute = threads, most_mb, rows_per_minute

    def finish(
        self, run: Run, contest: Contest, seeds: Sequence[int], places: Mapping[str, str]
    ) -> None:
        """Write, train and kill where no result says how it went, and write ``scores.json``.

        Raises:
            GatesError: The data are no simulated stream, or a training failed.
        """
        del contest
        seed = seeds[0] if seeds else 0
        run.settings["seed"] = seed
        feed = str((run.folder / FEED).absolute())
        if not isinstance(source_of({**run.settings, **places}), SimulatedStream):
            raise GatesError(
                "this study simulates its rows: set data.source to "
                "video_multitask.sources.simulated.SimulatedStream"
            )
        killed: dict[str, Any] = {
            "study.kills": self.kills,
            "study.prefix_steps": self.prefix_steps,
            "study.saved_every": self.saved_every,
        }
        store = run.store(KIND, Figures())
        others = {name: None for name in run.settings if not name.startswith("data.")}
        works = {
            run.piece("writing", **others): partial(write_feed, feed=feed),
            run.piece("one_pass", seed): partial(one_pass, feed=feed, threads=self.threads),
            run.piece("kills", seed, **killed): partial(kill, feed=feed, threads=self.threads),
        }
        figures_of: dict[str, dict[str, Any]] = {}
        for piece, work in works.items():
            prepare = None if piece.method == "writing" else partial(ready, run.settings, feed)
            for made in run.obtain(store, [piece], work, prepare=prepare):
                figures_of[made.method] = store.load(made)
        written = (Path(feed) / MANIFEST).is_file()
        data = stream_of(run.settings, feed).digest() if written else []
        run.finish(
            [Row(method, method, name, float(value)) for method, figures in figures_of.items()
             for name, value in figures.items()],
            self.bars(figures_of),
            seeds=[seed],
            data=data,
            metrics=SHOWN,
            headline=headline(figures_of),
            notes=(
                "memory: all resident pages of the training process and the proportional set size "
                "of its workers, in 10^6 bytes",
            ),
        )  # fmt: skip

    def bars(self, found: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
        """Return the bars of the figures of the three pieces; a missing figure is missed."""

        def figure(piece: str, name: str) -> float:
            return float(found.get(piece, {}).get(name, math.nan))

        return [
            Bar("rows written in a minute", figure("writing", "rows_per_minute"), ">=",
                self.rows_per_minute),
            Bar("memory of writing", figure("writing", "peak_mb"), "<=", self.most_mb, "MB"),
            Bar("memory of training", figure("one_pass", "peak_mb"), "<=", self.most_mb, "MB"),
            Bar("validation loss − that of base rates", figure("one_pass", "val_loss")
                - figure("writing", "base_rate_loss"), "<=", 0.0),
            Bar("kills that were resumed", figure("kills", "kills"), ">=", self.kills),
            Bar("losses that differ", figure("kills", "losses_that_differ"), "<=", 0),
            Bar("tensors of the checkpoint that differ", figure("kills", "tensors_that_differ"),
                "<=", 0),
        ]  # fmt: skip


def headline(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence on the whole pass and the kills; empty while one of them is missing."""
    if not {"one_pass", "kills"} <= found.keys():
        return ""
    read, killed = found["one_pass"], found["kills"]
    pace = read["rows_trained"] / read["seconds"] * 60
    return (
        f"{read['rows_trained']:,.0f} rows in one pass, {pace:,.0f} a minute with validation, "
        f"{read['peak_mb']:,.0f} MB at most; after {killed['kills']:.0f} kills "
        f"{killed['losses_that_differ']:.0f} of {killed['losses_compared']:.0f} losses differ."
    )


def write_feed(piece: Piece, job: Job, feed: str) -> dict[str, float]:
    """Write the shards and what is learned from them; measure rows per minute and memory."""
    del job
    remove(Path(feed))
    with MemoryMeter() as meter:
        begin = time.monotonic()
        stream = stream_of(piece.settings, feed)
        stream.prepare_data()
        seconds, shards = time.monotonic() - begin, stream.shards
        stream.keep_transform()
        rows = stream.batch("validation")
        base = summed_log_loss_of(rows, base_rates_of(stream, None))
    return {
        "rows": shards.rows,
        "training_rows": stream.parts["train"].rows,
        "seconds": seconds,
        "rows_per_minute": shards.rows / seconds * 60,
        "size_mb": sum(file.size for file in shards.files) / BYTES,
        "peak_mb": meter.peak / BYTES,
        "base_rate_loss": base,
    }


def one_pass(piece: Piece, job: Job, feed: str, threads: int) -> dict[str, float]:
    """Train one pass over all training rows; measure rows per second and memory."""
    child = ChildFit(piece.settings, {FOLDER: feed, **FIXED}, job.folder, "pass", threads)
    ended = child.run()
    rows = child.rows()
    last = next((row for row in reversed(rows) if row.get("val/loss")), {})
    stream = ready(piece.settings, feed)
    steps = int(load_weights(child.folder.checkpoints / "last.ckpt")["global_step"])
    figures = {
        "steps": steps,
        "rows_trained": steps * stream.batch_size,
        "seconds": ended.seconds,
        "peak_mb": ended.peak / BYTES,
    }
    return figures | {
        name.replace("/", "_"): float(value)
        for name, value in last.items()
        if name.startswith("val/") and value
    }


def kill(piece: Piece, job: Job, feed: str, threads: int) -> dict[str, float]:
    """Kill and resume a training; count what differs from one that was left alone."""
    steps, kills = int(piece["study.prefix_steps"]), int(piece["study.kills"])
    changes = {
        FOLDER: feed,
        **FIXED,
        "trainer.max_steps": steps,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 1,
        "checkpoint.every_n_steps": int(piece["study.saved_every"]),
        "checkpoint.monitor": None,
    }
    whole, broken = (
        ChildFit(piece.settings, changes, job.folder / name, name, threads)
        for name in ("whole", "broken")
    )
    for child in (whole, broken):
        remove(child.folder.training)
    whole.run()
    draw = np.random.default_rng([int(piece.seed or 0), kills])
    figures: dict[str, float] = {"kills": 0}
    for number in range(kills):
        width = steps / (kills + 1)
        at = int(number * width + draw.integers(1, max(2, int(width))))
        old = broken.log_file()

        def reached(old: int = old, at: int = at) -> bool:
            return broken.log_file() != old and broken.logged() > at

        if not broken.run(reached).killed:
            raise GatesError("the training ended before it was killed: raise study.prefix_steps")
        figures["kills"] += 1
        figures[f"kill_{number + 1}_after_batch"] = broken.logged()
        saved = broken.folder.last_checkpoint  # none before the first one
        figures[f"kill_{number + 1}_resumed_after"] = (
            int(load_weights(saved)["global_step"]) if saved else 0
        )
    broken.run()
    return figures | _differences(whole, broken)


def stream_of(settings: Mapping[str, Any], feed: str) -> ParquetStream:
    """Return the stream of a feed."""
    data = data_of({**{n: v for n, v in settings.items() if n.startswith("data.")}, FOLDER: feed})
    assert isinstance(data, ParquetStream)
    return data


def ready(settings: Mapping[str, Any], feed: str) -> ParquetStream:
    """Return the stream of a feed, written and with its vocabularies kept."""
    stream = stream_of(settings, feed)
    stream.prepare_data()
    stream.keep_transform()
    return stream


def _differences(whole: ChildFit, broken: ChildFit) -> dict[str, float]:
    first, second = whole.losses(), broken.losses()
    steps = first.keys() | second.keys()
    ends = [
        dict(_leaves(load_weights(c.folder.checkpoints / "last.ckpt"))) for c in (whole, broken)
    ]
    names = ends[0].keys() | ends[1].keys()
    return {
        "losses_compared": len(steps),
        "losses_that_differ": sum(first.get(step) != second.get(step) for step in steps),
        "tensors_compared": len(names),
        "tensors_that_differ": sum(
            name not in ends[0] or name not in ends[1] or not _same(ends[0][name], ends[1][name])
            for name in names
        ),
    }


def _leaves(value: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    """Return all tensors of a checkpoint by their place."""
    if isinstance(value, Mapping):
        return [leaf for key, child in value.items() for leaf in _leaves(child, f"{path}/{key}")]
    if isinstance(value, list | tuple):
        return [leaf for key, child in enumerate(value) for leaf in _leaves(child, f"{path}/{key}")]
    return [(path, value)] if isinstance(value, torch.Tensor) else []


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (tensor, other)))
