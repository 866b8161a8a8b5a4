"""Intercepts of tasks, with which mean predictions are the rates of held-out rows.

The last steps of a training leave the mean prediction of a rare task far from its rate, by chance.
One number for each task, added to its logits, corrects that and changes no order of rows.

B rows, T tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys.batch import Batch

if TYPE_CHECKING:
    from recsys.ranker import Ranker

LARGEST = 30.0
"""Largest intercept: e³⁰ is beyond all odds."""

_HALVINGS = 60
_ROWS = 8192


def intercepts_of(logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Return a_t (T,) with Σ s m σ(z + a) = Σ s m y for each task, in float64.

    It is 0 where a task has no positive or no negative row that counts.

    Args:
        logits: z (B, T).
        labels: y (B, T).
        mask: m (B, T).
        weight: s (B,).
    """
    z = logits.double()
    counted = mask.double() * weight.double().unsqueeze(1)
    rate = (counted * labels.double()).sum(0) / counted.sum(0)
    low = torch.full_like(rate, -LARGEST)
    high = -low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mean = (counted * (z + middle).sigmoid()).sum(0) / counted.sum(0)
        low = torch.where(mean < rate, middle, low)
        high = torch.where(mean < rate, high, middle)
    known = (rate > 0) & (rate < 1)
    return torch.where(known, (low + high) / 2, torch.zeros_like(rate))


@torch.no_grad()
def calibrate(ranker: Ranker, rows: Batch) -> None:
    """Set the intercepts of a ranker in evaluation mode on rows that it was not trained on.

    Args:
        ranker: Built with ``calibrated=True``.
        rows: Held-out rows (B,).

    Raises:
        ValueError: The ranker has no intercepts, or is in training mode.
    """
    if ranker.intercepts is None or ranker.training:
        raise ValueError("expected a ranker with calibrated=True, in evaluation mode")
    ranker.intercepts.zero_()
    parts = [rows.take(slice(k, k + _ROWS)) for k in range(0, len(rows), _ROWS)]
    logits = torch.cat([ranker(one.sparse, one.dense, one.sequences) for one in parts])
    ranker.intercepts.copy_(intercepts_of(logits, rows.labels, rows.mask, rows.weight))
