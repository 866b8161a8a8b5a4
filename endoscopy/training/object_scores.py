"""Validation scores of objects from the predictions of their frames, on all ranks."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from endoscopy.metrics.classification import macro_f1
from endoscopy.metrics.confusion import confusion_matrix
from endoscopy.metrics.size_classes import TRUTH, CutOffs, has_known_class


class ObjectScores(NamedTuple):
    """Scores of the median prediction of each object.

    Attributes:
        mae_mm: Mean absolute error of objects whose size is known, not a lower bound.
        macro_f1: Macro F1 of the three size classes.
    """

    mae_mm: float
    macro_f1: float


def object_scores(rows: Tensor, cut_offs: CutOffs) -> ObjectScores:
    """Score the median of each object's frames.

    Args:
        rows: One per frame (N, 5): object, frame, size_mm, censored, predicted_mm; a repeated
            frame counts once, since a sampler repeats frames to fill up a rank.
        cut_offs: Those of the predictions.

    Returns:
        The scores; NaN and 0 if a prediction is not finite, NaN where no object counts.
    """
    table = rows.double().numpy()
    _, first = np.unique(table[:, 1], return_index=True)
    table = table[first]
    if not np.isfinite(table[:, 4]).all():
        return ObjectScores(float("nan"), 0.0)
    _, first, member = np.unique(table[:, 0], return_index=True, return_inverse=True)
    predicted = np.array([np.median(table[member == i, 4]) for i in range(len(first))])
    sizes, censored = table[first, 2], table[first, 3] > 0
    errors = np.abs(predicted - sizes)[~censored]
    known = has_known_class(sizes, censored)
    matrix = confusion_matrix(TRUTH.classes(sizes[known]), cut_offs.classes(predicted[known]))
    mae = float(errors.mean()) if len(errors) else float("nan")
    return ObjectScores(mae, float(macro_f1(matrix)))


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (N, 5) of all ranks, which may have different numbers of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows.cpu()
    parts: list[Tensor] = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts)
