"""Whether an exported ranker gives what the eager one gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core_gates.errors import GatesError
from recsys.embedding.fields import MISSING
from recsys.inputs import Rows
from recsys.ranker import Ranker

BATCHES = (1, 37, 500)
TOLERANCE = 1e-5

Score = Callable[..., Tensor]
"""From sparse, dense and sequences to logits (B, T), as :meth:`Ranker.forward`."""


def random_rows(ranker: Ranker, number: int, *, seed: int = 0) -> Rows:
    """Return rows that a ranker can read: any rows of its tables, histories of any length.

    Args:
        ranker: Ranker.
        number: Number of rows B.
        seed: Of the random numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    bank, (first, *_) = ranker.banks[0], ranker.input_layers
    fields = [bank.sizes[field.table] for field in bank.fields]
    sparse = [torch.randint(size, (number,), generator=draw) for size in fields]
    sequences = []
    for history in first.histories:
        size, length = bank.sizes[bank.field(history.of).table], history.max_length
        events = torch.randint(size, (number, length), generator=draw)
        count = torch.randint(length + 1, (number, 1), generator=draw)
        sequences.append(events.masked_fill(torch.arange(length) < length - count, MISSING))
    return Rows(
        torch.stack(sparse, 1) if sparse else torch.empty(number, 0, dtype=torch.int64),
        torch.randn(number, ranker.dense_width, generator=draw),
        tuple(sequences),
    )


@torch.no_grad()
def largest_gaps(
    ranker: Ranker, score: Score, batches: Sequence[int] = BATCHES
) -> dict[int, float]:
    """Return the largest difference between two rankers by size of the batch.

    Differences are relative to 1 + |logit|.

    Args:
        ranker: In evaluation mode.
        score: What is compared with it.
        batches: Numbers of rows.
    """
    gaps = {}
    for number in batches:
        rows = random_rows(ranker, number, seed=number)
        expected, found = ranker(*rows), score(*rows)
        gaps[number] = float(((found - expected).abs() / (1 + expected.abs())).max())
    return gaps


def check_parity(ranker: Ranker, score: Score, form: str) -> dict[int, float]:
    """Return the gaps, all of which are below 1e-5.

    Raises:
        GatesError: One is not.
    """
    gaps = largest_gaps(ranker, score)
    for number, gap in gaps.items():
        if not gap <= TOLERANCE:
            raise GatesError(
                f"the ranker exported as {form} is off by {gap:.2g} at a batch of {number} rows, "
                f"more than {TOLERANCE:g}: use another form, and report this"
            )
    return gaps
