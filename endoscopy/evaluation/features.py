"""Hand-made cues of size: apparent area, brightness and depth, the rungs of the ladder."""

import numpy as np
import pandas as pd
import torch

from core_gates.errors import GatesError
from endoscopy.data.frames.streams import relative_inverse
from endoscopy.evaluation.frames import FrameStack


def frame_features(frames: FrameStack) -> pd.DataFrame:
    """Extract the cues of every frame, for regressions of log size.

    Args:
        frames: With depths where known.

    Returns:
        Columns unique_id, gt and

        - ``log_extent``: half the log of the masked fraction of the frame;
        - ``local_brightness``: mean gray value in the mask, 0 to 1 as displayed. The tone curve of
          a camera compresses light much as a logarithm does, so that this is roughly linear in
          the log of the distance; inverting the curve of the renderer gains less than 0.01 in MAPE;
        - ``frame_brightness``: mean gray value of the frame, also as displayed. Under automatic
          exposure the mean of linear light is the same for all frames and would be useless; that of
          the compressed values still depends on how deep the view is;
        - ``log_depth``: log of the median depth in the mask, mm;
        - ``relative_depth``: mean over the mask of the inverse depth, scaled to 0-1 over the frame,
          as a network for relative depth returns.

        The last two are NaN without depths.

    Raises:
        GatesError: A mask is empty.
    """
    masks = frames.masks
    share = masks.mean((1, 2))
    if not (share > 0).all():
        raise GatesError(f"{(share == 0).sum()} of {len(masks)} masks are empty; drop these frames")
    gray = frames.images.mean(-1, dtype=np.float32) / 255
    columns = {
        "unique_id": frames.objects,
        "gt": frames.gt,
        "log_extent": 0.5 * np.log(share),
        "local_brightness": masked_mean(gray, masks),
        "frame_brightness": gray.mean((1, 2)),
        "log_depth": np.full(len(frames), np.nan),
        "relative_depth": np.full(len(frames), np.nan),
    }
    if frames.depths is not None:
        columns["log_depth"] = np.log(masked_median(frames.depths, masks))
        inverse = relative_inverse(torch.from_numpy(frames.depths)[:, None])[:, 0].numpy()
        columns["relative_depth"] = masked_mean(inverse, masks)
    return pd.DataFrame(columns)


def masked_mean(values: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the mean of values (N, H, W) over each mask (N, H, W), (N,)."""
    total = np.einsum("nhw,nhw->n", values, masks.astype(values.dtype))
    return np.asarray(total / masks.sum((1, 2)))


def masked_median(values: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the median of the positive values (N, H, W) in each mask, (N,); NaN if none is."""
    inside = masks & (values > 0)
    return np.array(
        [
            np.median(value[mask]) if mask.any() else np.nan
            for value, mask in zip(values, inside, strict=True)
        ]
    )
