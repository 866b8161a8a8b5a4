"""What would the missing scale be worth? Relative depth with the true scale.

Monocular depth lacks one number, its scale. The audit computes that number from the true size,
once for each frame, once for each lesion, or once for all (arXiv 2605.20461), gives the predictor
the scaled depth, and shows what remains: with predicted masks most of the gain may be lost.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd

from endoscopy.evaluation.audits.conditions import condition_rows
from endoscopy.evaluation.features import masked_median
from endoscopy.evaluation.frames import FrameStack, Predictor, predictions_of
from endoscopy.metrics import CONTINUOUS, CutOffs

Per = Literal["frame", "polyp", "all"]


def size_proxy(masks: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Return the extent of each mask times its median depth (N,), proportional to the size."""
    return np.sqrt(masks.mean((1, 2))) * masked_median(depths, masks)


def relative_depths(depths: np.ndarray) -> np.ndarray:
    """Return each frame's depth over its median, which loses the scale; 0 where unknown."""
    medians = np.array([np.median(depth[depth > 0]) for depth in depths])
    relative: np.ndarray = depths / medians[:, None, None]
    return relative


def fit_scale(proxy: np.ndarray, gt: np.ndarray) -> float:
    """Return the scale s of least squares |s proxy - gt|²."""
    return float(proxy @ gt / (proxy @ proxy))


def oracle_scales(proxy: np.ndarray, gt: np.ndarray, objects: np.ndarray, per: Per) -> np.ndarray:
    """Return the scale of each frame (N,) that fits the true sizes.

    Args:
        proxy: (N,) size up to the scale, of :func:`size_proxy`.
        gt: (N,) true sizes, mm.
        objects: (N,) identity of the object.
        per: One scale for each frame, each polyp, or all frames.
    """
    if per == "frame":
        return gt / proxy
    if per == "all":
        return np.full(len(gt), fit_scale(proxy, gt))
    _, index = np.unique(objects, return_inverse=True)
    scales = np.bincount(index, proxy * gt) / np.bincount(index, proxy**2)
    return scales[index]


def oracle_scale_audit(
    predict: Predictor,
    frames: FrameStack,
    relative_depths: np.ndarray,
    *,
    global_scale: float,
    masks: Mapping[str, np.ndarray] | None = None,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Give the predictor relative depth, scaled by the truth, with true and with other masks.

    Scales come from the true masks. The predictor was trained on metric depth, or on relative
    depth with scales computed in the same way.

    Args:
        predict: Reads ``depths`` and ``masks`` of frames.
        frames: Held-out frames, with true masks.
        relative_depths: (N, H, W) positive depth up to a scale of each frame.
        global_scale: The one scale, :func:`fit_scale` over training objects.
        masks: Name -> other masks (N, H, W), such as predicted ones.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows of :func:`condition_rows` named ``one scale``, ``true scale of each polyp`` and ``true
        scale of each frame``, with ``, NAME`` for other masks; the first is the reference.
    """
    proxy = size_proxy(frames.masks, relative_depths)
    scales = {"one scale": np.full(len(frames), global_scale)}
    for per in ("polyp", "frame"):
        found = oracle_scales(proxy, frames.gt, frames.objects, per)  # type: ignore[arg-type]
        scales[f"true scale of each {per}"] = found
    conditions = {}
    for mask_name, mask in ({"": frames.masks} | dict(masks or {})).items():
        for name, scale in scales.items():
            scaled = frames.with_(masks=mask, depths=relative_depths * scale[:, None, None])
            label = f"{name}, {mask_name}" if mask_name else name
            conditions[label] = predictions_of(predict, scaled)
    return condition_rows(conditions, reference="one scale", cut_offs=cut_offs, resamples=resamples)
