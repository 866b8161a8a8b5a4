"""Does the model need a perfect outline? Other masks, and boxes that are wrong by a fifth."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from endoscopy.data.frames.outlines import box_masks, boxes_of, ellipse_masks
from endoscopy.evaluation.audits.conditions import condition_rows
from endoscopy.evaluation.frames import FrameStack, Predictor, predictions_of
from endoscopy.metrics import CONTINUOUS, CutOffs

ERROR = 0.2


def mask_audit(
    predict: Predictor,
    frames: FrameStack,
    *,
    predicted: Mapping[str, np.ndarray] | None = None,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Replace the true masks by those available in practice.

    Args:
        predict: Takes frames, true masks in training.
        frames: Held-out frames with true masks and boxes.
        predicted: Name -> masks (N, H, W) of a segmenter; the boxes then follow them. Where such
            a mask is empty, the true box is filled.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows ``true mask``, ``box``, ``ellipse in the box`` and the names of ``predicted``, with
        ``overlap``, the mean intersection over union with the true mask; see
        :func:`condition_rows`.
    """
    height, width = frames.masks.shape[1:]
    filled = box_masks(frames.boxes, height, width)
    substitutes = {
        "true mask": frames,
        "box": frames.with_(masks=filled),
        "ellipse in the box": frames.with_(masks=ellipse_masks(frames.boxes, height, width)),
    }
    for name, masks in (predicted or {}).items():
        empty = np.flatnonzero(~masks.any((1, 2)))
        masks, boxes = masks.copy(), boxes_of(masks)
        masks[empty], boxes[empty] = filled[empty], frames.boxes[empty]
        substitutes[name] = frames.with_(masks=masks, boxes=boxes)
    rows = condition_rows(
        {name: predictions_of(predict, one) for name, one in substitutes.items()},
        reference="true mask",
        cut_offs=cut_offs,
        resamples=resamples,
    )
    overlaps = [_overlap(one.masks, frames.masks) for one in substitutes.values()]
    return rows.assign(overlap=overlaps)


def box_audit(
    predict: Predictor,
    frames: FrameStack,
    *,
    error: float = ERROR,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Scale the boxes by 1 ± ``error`` and shift them by ``error`` of their sides.

    Masks are drawn again in the wrong boxes, so that masks and boxes agree. The reference
    has the right boxes and masks drawn in the same way.

    Args:
        predict: Takes frames.
        frames: Held-out frames.
        error: Relative error of the boxes.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows of :func:`condition_rows` and ``log_change``, the mean over frames of
        |log predicted - log predicted with the right box|.
    """
    perturbations: dict[str, tuple[float, tuple[float, float]]] = {
        "right box": (1.0, (0.0, 0.0)),
        f"box {1 - error:.0%}": (1 - error, (0.0, 0.0)),
        f"box {1 + error:.0%}": (1 + error, (0.0, 0.0)),
        f"shift {error:.0%} right": (1.0, (error, 0.0)),
        f"shift {error:.0%} down": (1.0, (0.0, error)),
    }
    height, width = frames.masks.shape[1:]
    conditions = {}
    for name, (scale, shift) in perturbations.items():
        boxes = perturbed_boxes(frames.boxes, height, width, scale=scale, shift=shift)
        changed = frames.with_(boxes=boxes, masks=ellipse_masks(boxes, height, width))
        conditions[name] = predictions_of(predict, changed)
    rows = condition_rows(conditions, reference="right box", cut_offs=cut_offs, resamples=resamples)
    return rows.assign(log_change=_log_changes(list(conditions.values())))


def perturbed_boxes(
    boxes: np.ndarray,
    height: int,
    width: int,
    *,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Scale boxes about their centers and shift them, then clip them to the frame.

    Args:
        boxes: (N, 4) pixels xmin, ymin, xmax, ymax, maxima exclusive.
        height: Of the frames.
        width: Of the frames.
        scale: Factor on both sides, 0.8 or 1.2 for an error of 20 %.
        shift: Right and down, in sides of the box.

    Returns:
        (N, 4), at least one pixel wide and high.
    """
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = boxes[:, 2:] - boxes[:, :2]
    center = center + sides * np.asarray(shift)
    limit = np.array([width, height], dtype=float)
    low = np.clip(center - scale * sides / 2, 0, limit - 1)
    high = np.clip(center + scale * sides / 2, low + 1, limit)
    return np.concatenate([low, high], 1)


def _log_changes(predictions: Sequence[pd.DataFrame]) -> list[float]:
    logs = [np.log(one["predicted_mm"].to_numpy(float)) for one in predictions]
    return [float(np.abs(one - logs[0]).mean()) for one in logs]


def _overlap(masks: np.ndarray, true: np.ndarray) -> float:
    both, either = (masks & true).sum((1, 2)), (masks | true).sum((1, 2))
    return float((both / np.maximum(either, 1)).mean())
