"""Work on a piece: claimed, computed and kept by one process, with others that help to train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from core_gates.errors import GatesError
from harness.experiment.job import Job, claimed, partial_of
from harness.experiment.piece import Piece
from harness.experiment.store import Store
from harness.runs.processes import Tick

R = TypeVar("R")
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
        with TemporaryDirectory() as own:
            work(piece, Job(Path(own), first=partial_of(store.folder, piece)))
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
