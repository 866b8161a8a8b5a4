"""``gates video loadtest``: a service under load on this machine, with a swap of the model."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from apps.video.serving.made_up import made_up
from apps.video.serving.model import Model, place_of, read_model
from apps.video.serving.requests import RequestReader, fields_of_user
from core_gates.errors import GatesError, MissingExtraError, check_positive
from harness.command.verbs import Place
from harness.evidence import Bar, Row
from harness.experiment.printing import print_scores
from harness.experiment.scores import Scores, write_scores
from harness.files import write_json
from harness.runs.ticker import working
from recsys.parts import find_parts

MANIFEST = "current.json"
SAME = 1e-6  # difference of a probability that counts as none


@dataclass(frozen=True)
class LoadOptions:
    """How much is asked.

    Attributes:
        candidates: Candidates of a request.
        requests: Number of distinct requests.
        clients: Clients, each of which waits for its answer before it asks again.
        seconds: Duration of the load with the swap.
        slice_s: Seconds of each slice with and without batching.
        slices: Pairs of slices.

    Raises:
        ValueError: A number is not positive.
    """

    candidates: int = 20
    requests: int = 64
    clients: int = 50
    seconds: float = 30.0
    slice_s: float = 3.0
    slices: int = 4

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive(**dataclasses.asdict(self))


LOAD = LoadOptions()


def loadtest(
    place: Place,
    model: str | None = None,
    swap_to: str | None = None,
    rows: str | None = None,
    load: LoadOptions = LOAD,
    threads: int = 1,
) -> None:
    """Serve a model on this machine, put it under load, and swap the model in the middle.

    Prints errors, throughput, latency, growth of resident memory, the gain of batching over single
    requests, and the largest difference from what gates video score gives for the same rows.
    Clients run on the same machine.

    Args:
        place: Filled in by the command line.
        model: Folder of the model; by default that of the run.
        swap_to: Model that replaces it; a copy of it by default.
        rows: Parquet or CSV file whose rows become requests; made-up rows by default.
        load: How much is asked.
        threads: Threads of the network.
    """
    try:
        from video_multitask.service.load_test import LoadTest
    except ImportError as error:
        raise MissingExtraError("serve", str(error.name)) from error
    first = place_of(place, model).resolve()
    with tempfile.TemporaryDirectory(prefix="gates-loadtest-") as temporary:
        second = Path(swap_to).resolve() if swap_to else Path(temporary) / f"{first.name}-copy"
        if not swap_to:
            shutil.copytree(first, second)
        asked = Requests({m.version: m for m in map(read_model, (first, second))})
        asked.make(_table(asked.first, rows, load), load.candidates)
        manifest = Path(temporary) / MANIFEST
        write_json(manifest, {"folder": str(first)})
        verdict = LoadTest(
            lambda batching: _command(manifest, threads, batching),
            asked.bodies,
            swap=lambda: write_json(manifest, {"folder": str(second)}),
            difference=asked.difference,
            clients=load.clients,
            seconds=load.seconds,
            slice_s=load.slice_s,
            slices=load.slices,
            during=working,
        ).run()
    if verdict.first_error:
        print(f"first error: {verdict.first_error}")
    notes = [f"{name} {number:g}" for name, number in dataclasses.asdict(load).items()]
    scores = Scores(_rows(verdict), _bars(verdict), notes=notes)
    path = place.run_folder.path / "loadtest" / "scores.json"
    print_scores(write_scores(path, scores, app="video", config_path=None), scores)


class Requests:
    """Bodies of requests, and what ``score`` gives for their rows.

    Args:
        models: By version.

    Attributes:
        first: The model that begins.
        bodies: Of the requests.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.models = models
        self.first = next(iter(models.values()))
        self.bodies: list[bytes] = []
        self._tables: list[pl.DataFrame] = []
        self._expected: dict[tuple[int, str], Any] = {}

    def make(self, table: pl.DataFrame, candidates: int) -> None:
        """Cut a table into requests; features of the user are those of the first row of each.

        Args:
            table: Rows as ``score`` reads them, of whatever types.
            candidates: Rows of a request.
        """
        scorer = self.first.scorer
        reader = RequestReader(scorer.transform, scorer.task_names)
        users = fields_of_user(scorer.schema)
        others = [name for name in scorer.schema.features if name not in users]
        for start in range(0, len(table), candidates):
            rows = table[start : start + candidates]
            same = rows[[0] * len(rows)].with_columns(rows[name] for name in others)
            typed = reader.typed(same)
            content = {
                "user": typed.select(users).row(0, named=True) if users else {},
                "candidates": typed.select(others).to_dicts(),
            }
            self.bodies.append(json.dumps(content).encode())
            self._tables.append(same)

    def difference(self, place: int, version: str, content: bytes) -> float:
        """Return the largest difference of the probabilities of an answer from those offline."""
        if version not in self.models:
            return math.inf
        if (key := (place, version)) not in self._expected:
            self._expected[key] = self.models[version].scorer.score(self._tables[place])
        expected = self._expected[key].probabilities
        found = np.array(json.loads(content)["probabilities"])
        return float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf


def _table(model: Model, source: str | None, load: LoadOptions) -> pl.DataFrame:
    """Return rows for requests: the first ones of a file, or made-up ones."""
    count = load.candidates * load.requests
    if source is None:
        return made_up(model.scorer.transform, count)
    schema, (part, *_) = model.scorer.schema, find_parts([source])
    schema.check_columns(part.columns(), labels=False)
    lists = [history.name for history in schema.sequences]
    missing = model.scorer.transform.missing
    first = next(part.blocks(schema.features, lists, missing))[:count]
    if not len(first):
        raise GatesError(f"{part.path} has no rows: name another file by --rows")
    return first


def _command(manifest: Path, threads: int, batching: bool) -> Sequence[str]:
    words = ["--model", str(manifest), "--port", "0", "--poll_s", "0.2", "--threads", str(threads)]
    words += ["--unknown", "score"]  # as `score` does with the rows of a file
    if not batching:
        words += ["--limits.max_batch_requests", "1", "--limits.max_wait_ms", "0"]
    return [sys.executable, "-m", "apps.main", "video", "serve", *words]


def _rows(verdict: Any) -> list[Row]:
    figures = {
        "requests": verdict.requests,
        "requests/s": verdict.throughput,
        "p50 ms": verdict.p50_ms,
        "p99 ms": verdict.p99_ms,
        "batching gain": verdict.batching_gain,
        "memory growth": verdict.growth,
        "difference": verdict.difference,
    }
    return [Row("service", "load with a swap", name, float(v)) for name, v in figures.items()]


def _bars(verdict: Any) -> list[Bar]:
    return [
        Bar("requests without a proper answer", verdict.errors, "<=", 0),
        Bar("models that answered", verdict.versions, ">=", 2),
        Bar("growth of resident memory", verdict.growth, "<=", 0.05),
        Bar("throughput with batching over without", verdict.batching_gain, ">=", 1.5),
        Bar("difference from score", verdict.difference, "<=", SAME),
    ]
