"""The part of a frame that is not padding, and the units of boxes."""

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
BLACK = 10  # of 255; no brighter luma counts as border
DARK = 1 / 8  # of the brightest luma; color that bleeds into padding stays below
SPARSE = 1 / 50  # of the lit pixels of the fullest row; light that bleeds into padding stays below
UNIFORM = 24  # of 255; bound on how lossy coding changes padding of one color
OUTLIERS = 0.1  # fraction of padding that ringing at its edge may disturb


def stated_part(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Crop padding at the right and at the bottom, or all around, if the frame is padded.

    A frame that is larger than stated was either padded or enlarged. It was padded if everything
    beyond the stated size has one color, or is a single row or column, as in frames made even for
    video: lossy colors bleed into it.

    Args:
        image: (H, W, 3) uint8.
        size: Stated width and height.

    Returns:
        The frame, cropped to the stated size if it is padded, else unchanged, and the offset (x,
        y).
    """
    width, height = size
    spare_x, spare_y = image.shape[1] - width, image.shape[0] - height
    if min(spare_x, spare_y) < 0 or max(spare_x, spare_y) == 0:
        return image, (0, 0)
    if max(spare_x, spare_y) == 1:
        return image[:height, :width], (0, 0)
    half = spare_x // 2, spare_y // 2
    for left, top in ((0, 0), half, (half[0] // 2 * 2, half[1] // 2 * 2)):
        part = (slice(top, top + height), slice(left, left + width))
        outside = np.ones(image.shape[:2], dtype=bool)
        outside[part] = False
        padding = image[outside].astype(np.int16)
        deviation = np.abs(padding - np.median(padding, axis=0)).max(axis=1)
        if (deviation > UNIFORM).mean() <= OUTLIERS:
            return image[part], (left, top)
    return image, (0, 0)


def trim_black(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Crop dark rows and columns at the four sides.

    A pixel is dark if its luma is at most an eighth of the largest one, or at most 10;
    a row is dark if it has at most a fiftieth of the bright pixels of the fullest row. Hence
    lossy coding, which lets color and some light bleed into a black border, moves no edge, a frame
    and the same frame padded with black give the same result, and video black (16) is black.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        The part within, and its offset (x, y). A frame that is dark throughout is unchanged.
    """
    luma = image @ LUMA
    lit = luma > max(BLACK, DARK * luma.max())
    if not lit.any():
        return image, (0, 0)
    top, bottom = _ends(lit.sum(axis=1))
    left, right = _ends(lit.sum(axis=0))
    return image[top:bottom, left:right], (left, top)


def _ends(counts: np.ndarray) -> tuple[int, int]:
    """Return the first and the last place, exclusive, that is well filled."""
    filled = np.flatnonzero(counts > SPARSE * counts.max())
    return int(filled[0]), int(filled[-1]) + 1
