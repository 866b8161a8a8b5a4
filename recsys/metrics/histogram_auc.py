"""The area under the ROC curve of a stream, from counts that add up over batches and ranks."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from core_gates.collectives import Group, all_reduce, num_ranks
from core_gates.errors import check_at_least
from recsys.metrics.inputs import binary_rows, missing_class, probabilities

REACH = 16.0
"""Probabilities beyond a logit of 16, nearer to 0 or 1 than 1.1e-7, share the outermost bins."""


class BoundedAUC(NamedTuple):
    """An area with what its bins may hide.

    Attributes:
        value: The area, rows of one bin counting as tied; NaN where it is not defined.
        error: The exact area differs by at most this.
        reason: Why it is not defined; else empty.
    """

    value: float
    error: float
    reason: str = ""


class HistogramAUC:
    """The AUC of a stream of any length, in constant memory.

    Bins are evenly wide in the logit, so that rare events are resolved as well. The exact area
    differs by at most half of the fraction of pairs, one positive and one negative row, that
    share a bin.

    Args:
        bins: Number of bins.

    Attributes:
        counts: Weight of negative and positive rows in each bin (2, bins), float64.

    Raises:
        ValueError: There are fewer than two bins.
    """

    def __init__(self, bins: int = 2**14) -> None:
        check_at_least(2, bins=bins)
        self.counts = np.zeros((2, bins))

    def update(self, probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> None:
        """Add rows.

        Args:
            probs: (N,) predicted probabilities.
            labels: (N,), 0 or 1.
            weights: (N,) sample weights; 1 by default.

        Raises:
            GatesError: Lengths differ, or a probability or label is none.
        """
        values, positive, given = binary_rows(probs, labels, weights)
        bins = self.counts.shape[1]
        with np.errstate(divide="ignore"):
            logits = np.log(probabilities(values)) - np.log1p(-values)
        place = np.clip((logits + REACH) * (bins / (2 * REACH)), 0, bins - 1).astype(np.intp)
        flat = np.bincount(place + bins * positive, given, minlength=2 * bins)
        self.counts += flat.reshape(2, bins)

    def all_reduce(self, group: Group = None, device: torch.device | str = "cpu") -> None:
        """Add the rows of all ranks; every rank must call this, once and last.

        Args:
            group: Process group.
            device: Where its backend reduces: the GPU of this rank for NCCL.
        """
        if num_ranks(group) > 1:
            counts = torch.from_numpy(self.counts).to(device)
            self.counts = all_reduce(counts, group).cpu().numpy()

    def compute(self) -> BoundedAUC:
        """Return the area of all rows so far and the bound of its error."""
        negative, positive = self.counts
        pairs = negative.sum() * positive.sum()
        if reason := missing_class(positive.sum(), negative.sum()):
            return BoundedAUC(float("nan"), float("nan"), reason)
        wins = positive @ (negative.cumsum() - negative / 2)
        return BoundedAUC(float(wins / pairs), float(positive @ negative / (2 * pairs)))
