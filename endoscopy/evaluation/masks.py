"""Masks made from boxes, boxes from masks, and boxes that are wrong on purpose."""

import numpy as np


def box_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill boxes.

    Args:
        boxes: (N, 4) pixels xmin, ymin, xmax, ymax, maxima exclusive.
        height: Of the frames.
        width: Of the frames.

    Returns:
        (N, height, width) boolean: pixels whose center lies in the box.
    """
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    xmin, ymin, xmax, ymax = (side[:, None] for side in boxes.T)
    columns, rows = (x >= xmin) & (x < xmax), (y >= ymin) & (y < ymax)
    return rows[:, :, None] & columns[:, None, :]


def ellipse_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill the ellipses inscribed into boxes; arguments and result as of :func:`box_masks`."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    xmin, ymin, xmax, ymax = (side[:, None] for side in boxes.T)
    across = ((2 * x - xmin - xmax) / np.maximum(xmax - xmin, 1e-6)) ** 2
    down = ((2 * y - ymin - ymax) / np.maximum(ymax - ymin, 1e-6)) ** 2
    inside: np.ndarray = across[:, None, :] + down[:, :, None] < 1
    return inside


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Return the tight boxes (N, 4) of masks (N, H, W), zeros where a mask is empty."""
    result = np.zeros((len(masks), 4))
    for axis, (low, high) in ((1, (0, 2)), (2, (1, 3))):  # any over rows gives columns
        inside = np.asarray(masks.any(axis))
        result[:, low] = inside.argmax(1)
        result[:, high] = inside.shape[1] - inside[:, ::-1].argmax(1)
    result[~masks.any((1, 2))] = 0
    return result


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
        boxes: (N, 4) as of :func:`box_masks`.
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
