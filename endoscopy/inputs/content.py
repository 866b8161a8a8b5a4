"""The part of a frame that shows something: without padding, and in which units boxes are."""

import numpy as np

BLACK = 10  # of 255; darker in all channels counts as border
UNIFORM = 24  # of 255; what lossy coding makes of padding of one color stays within
OUTLIERS = 0.1  # share of padding that ringing at its edge may disturb


def stated_part(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut padding at the right and at the bottom, if that is why the size is not as stated.

    A frame that is larger than stated was either padded or enlarged. It was padded if everything
    beyond the stated size has one color.

    Args:
        image: (H, W, 3) uint8.
        size: Stated width and height.

    Returns:
        The frame, cut to the stated size if it is padded, else as it is.
    """
    width, height = size
    if image.shape[0] < height or image.shape[1] < width or image.shape[:2] == (height, width):
        return image
    outside = np.ones(image.shape[:2], dtype=bool)
    outside[:height, :width] = False
    padding = image[outside].astype(np.int16)
    deviation = np.abs(padding - np.median(padding, axis=0)).max(axis=1)
    is_padded = (deviation > UNIFORM).mean() <= OUTLIERS
    return image[:height, :width] if is_padded else image


def trim_black(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Cut rows and columns at the four sides in which no pixel is brighter than 10 of 255.

    A frame and the same frame padded with black give the same result.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        The part within, and its offset (x, y). A frame that is black throughout stays as it is.
    """
    brightest = image.max(axis=2)
    rows = np.flatnonzero(brightest.max(axis=1) > BLACK)
    columns = np.flatnonzero(brightest.max(axis=0) > BLACK)
    if not len(rows):
        return image, (0, 0)
    top, left = int(rows[0]), int(columns[0])
    return image[top : rows[-1] + 1, left : columns[-1] + 1], (left, top)
