"""Outlines of lesions: masks drawn into boxes, and boxes around masks."""

import numpy as np
import torch

from endoscopy.data.frames.streams import fill_boxes


def box_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill boxes.

    Args:
        boxes: (N, 4) pixels xmin, ymin, xmax, ymax, maxima exclusive.
        height: Of the frames.
        width: Of the frames.

    Returns:
        (N, height, width) boolean: every pixel that a box touches.
    """
    corners = torch.from_numpy(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
    filled: np.ndarray = fill_boxes(corners, height, width)[:, 0].numpy() > 0
    return filled


def ellipse_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill the ellipses inscribed into boxes: pixels whose center is inside.

    Arguments and result as of :func:`box_masks`.
    """
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
