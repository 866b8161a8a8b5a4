"""Repairing boxes: rescaled to the image, corners in order, inside the frame, not too small."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SMALLEST_AREA = 16.0
SMALLEST_RENDERED = 1.0  # boxes of rendered frames are not drawn by hand: small ones are right

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class RepairedBoxes(NamedTuple):
    """N boxes and what was done to each.

    Attributes:
        boxes: (N,4) float64 xmin, xmax, ymin, ymax in pixels of the image, edges not centers.
        rescaled: (N,) the annotation gives another image size than the image has.
        swapped: (N,) a minimum was above its maximum.
        clipped: (N,) the box left the frame.
        invalid: (N,) a corner is not a finite number; to be excluded.
        small: (N,) less than 16 square pixels, or ``smallest``, are inside the frame; to be
            excluded.
    """

    boxes: Floats
    rescaled: Flags
    swapped: Flags
    clipped: Flags
    invalid: Flags
    small: Flags


def repair_boxes(
    boxes: Floats, annotated: Floats, actual: Floats, smallest: float | Floats = SMALLEST_AREA
) -> RepairedBoxes:
    """Bring boxes into the frame of their images.

    Args:
        boxes: (N,4) xmin, xmax, ymin, ymax as annotated.
        annotated: (N,2) width and height that the annotation gives; not above 0 or NaN where it
            gives none.
        actual: (N,2) width and height of the image.
        smallest: Smallest area in square pixels, of all or (N,) of each.
    """
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    stated = np.nan_to_num(annotated, nan=0.0) > 0
    rescaled = (stated & (annotated != actual)).any(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(stated, actual / annotated, 1.0)
    boxes *= np.repeat(scale, 2, axis=1)

    invalid = np.asarray(~np.isfinite(boxes).all(axis=1))
    boxes[invalid] = 0.0
    low, high = boxes[:, 0::2].copy(), boxes[:, 1::2].copy()
    swapped = np.asarray((low > high).any(axis=1))
    low, high = np.minimum(low, high), np.maximum(low, high)
    inside_low, inside_high = np.clip(low, 0.0, actual), np.clip(high, 0.0, actual)
    clipped = (inside_low != low).any(axis=1) | (inside_high != high).any(axis=1)
    small = ~invalid & ((inside_high - inside_low).prod(axis=1) < smallest)

    boxes[:, 0::2], boxes[:, 1::2] = inside_low, inside_high
    return RepairedBoxes(boxes, rescaled, swapped, clipped, invalid, small)
