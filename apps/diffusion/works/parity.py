"""A group of checks as a piece of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion.evaluation.parity.checks import run_group
from harness.experiment import Job, Piece


def run_checks(piece: Piece, job: Job, vectors: Path) -> dict[str, Any]:
    """Return name of a figure -> ``value``, ``n`` and ``at``.

    Args:
        piece: Its method is the group.
        job: Ticks when all are done.
        vectors: Folder of the golden vectors.
    """
    found = {name: check._asdict() for name, check in run_group(piece.method, vectors).items()}
    job.tick()
    return found
