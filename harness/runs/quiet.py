"""Library messages of no use to the user, kept off the terminal."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core_gates.errors import GatesError

UNWANTED = (
    "The number of training batches",  # the log's interval exceeds the epoch: on purpose
    "The '.*dataloader' does not have many workers",  # small data is loaded faster without any
    "Your `IterableDataset` has `__len__` defined",  # streams here count their own steps
    "You're resuming from a checkpoint that ended before the epoch ended",  # see harness.runs.loops
    "`isinstance\\(treespec, LeafSpec\\)`",  # Lightning's use of torch
    "isinstance\\(treespec, LeafSpec\\)",
    "Mismatch dtype between input and weight",  # RMS norms of diffusers under autocast
)


def quiet_lightning() -> None:
    """Keep Lightning to its warnings that matter here: no adverts, no list of absent hardware."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls of it
    for message in UNWANTED:
        warnings.filterwarnings("ignore", message=message)


_held: list[tuple[Any, ...]] | None = None  # None: warnings are shown at once


@contextmanager
def held_warnings() -> Iterator[None]:
    """Hold warnings back until the work begins; where an error is one line, they are not shown.

    The work begins at :func:`release_warnings`, or at the end of the block.
    """
    global _held
    shown = warnings.showwarning

    def show(*words: Any, **more: Any) -> None:
        if _held is None:
            shown(*words, **more)
        else:
            _held.append(words)

    _held = []
    warnings.showwarning = show
    try:
        yield
    except (GatesError, OSError, SystemExit):
        _held = []
        raise
    finally:
        release_warnings()
        warnings.showwarning = shown


def release_warnings() -> None:
    """Show the warnings that were held back, and all further ones at once."""
    global _held
    waiting, _held = _held or [], None
    for words in waiting:
        warnings.showwarning(*words)
