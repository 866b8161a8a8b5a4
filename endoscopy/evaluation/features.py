"""Hand-made cues of size: apparent area, brightness and depth, the rungs of the ladder.

All are logarithms of quantities to which the size is proportional in the ideal case, so that a
log-linear regression can combine them.
"""

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.evaluation.frames import Frames

GAMMA = 1.4
KNEE, WHITE = 0.35, 1.15
DARK = 1e-3  # radiance below which a logarithm would amplify noise

FEATURES = ("log_extent", "relative_depth", "log_local", "log_frame", "log_depth")


def frame_features(frames: Frames) -> pd.DataFrame:
    """Extract the cues of every frame.

    Args:
        frames: With depths where known; see the columns.

    Returns:
        Columns unique_id, gt and

        - ``log_extent``: half the log of the masked share of the frame;
        - ``log_local``: half the log of the mean radiance in the mask;
        - ``log_frame``: half the log of the mean radiance of the frame;
        - ``log_depth``: log of the median depth in the mask, mm;
        - ``relative_depth``: mean over the mask of the depth that is scaled to 0-1 frame by frame.

        The radiance falls with the square of the distance, hence the halves. The last two are NaN
        without depths.

    Raises:
        GatesError: A mask is empty.
    """
    masks = frames.masks
    share = masks.mean((1, 2))
    if not (share > 0).all():
        raise GatesError(f"{(share == 0).sum()} of {len(masks)} masks are empty; drop these frames")
    light = radiance(frames.images)
    columns = {
        "unique_id": frames.objects,
        "gt": frames.gt,
        "log_extent": 0.5 * np.log(share),
        "log_local": 0.5 * np.log(masked_mean(light, masks) + DARK),
        "log_frame": 0.5 * np.log(light.mean((1, 2)) + DARK),
        "log_depth": np.full(len(frames), np.nan),
        "relative_depth": np.full(len(frames), np.nan),
    }
    if frames.depths is not None:
        columns["log_depth"] = np.log(masked_median(frames.depths, masks))
        columns["relative_depth"] = masked_mean(relative(frames.depths), masks)
    return pd.DataFrame(columns)


def radiance(images: np.ndarray) -> np.ndarray:
    """Undo the tone curve of the display and average the colors.

    The curve is that of the renderer: ``(1.15 x / (0.35 + x)) ** (1 / 1.4)``. For other cameras it
    is a guess.

    Args:
        images: (N, H, W, 3) uint8.

    Returns:
        (N, H, W) float32, not negative.
    """
    table = (np.arange(256, dtype=np.float32) / 255) ** GAMMA
    table = KNEE * table / (WHITE - table)
    return table[images].mean(-1)


def relative(depths: np.ndarray) -> np.ndarray:
    """Scale the depth of each frame (N, H, W) to 0-1 over its known pixels, 0 where unknown."""
    known = depths > 0
    low = np.where(known, depths, np.inf).min((1, 2), keepdims=True)
    high = depths.max((1, 2), keepdims=True)
    scaled = (depths - low) / np.maximum(high - low, 1e-6)
    return np.where(known, scaled, 0)


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
