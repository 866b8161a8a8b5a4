"""Features of a square patch: colors of center and rim, rings of light, oriented gradients."""

import numpy as np
import pandas as pd

POSITION = "position alone"
LUMINANCE = np.array([0.299, 0.587, 0.114])
RINGS, CELLS, ORIENTATIONS = 6, 4, 8


def patch_features(patches: np.ndarray) -> np.ndarray:
    """Return the features of patches.

    - colors: mean and deviation of log red, green, blue in the inner and the outer half of the
      area, and the differences of the means;
    - rings: luminance relative to its mean and gradient away from the center, in six rings around
      it, since a polyp is a shaded bump;
    - histograms of oriented gradients in 4 x 4 cells (Dalal and Triggs, 2005), each cell of length
      one.

    Args:
        patches: (N, S, S, 3) uint8.

    Returns:
        (N, F) float64.
    """
    pixels = patches.astype(np.float64)
    return np.concatenate([_colors(pixels), _rings(pixels), _oriented(pixels)], axis=1)


def position_features(patches: pd.DataFrame) -> np.ndarray:
    """Return center, its square, and side relative to the frame (N, 5): all but the picture."""
    x = (patches["xmin"] + patches["side"] / 2) / patches["width"]
    y = (patches["ymin"] + patches["side"] / 2) / patches["height"]
    return np.stack([x, y, x**2, y**2, patches["side"] / patches["width"]], axis=1)


def _radius(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distance from the center, 1 at the middle of a side, and its direction."""
    line = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(line, line, indexing="ij")
    radius = np.hypot(x, y)
    return radius, x / radius.clip(1e-9), y / radius.clip(1e-9)


def _colors(pixels: np.ndarray) -> np.ndarray:
    radius, _, _ = _radius(pixels.shape[1])
    logs = np.log(pixels + 4.0)
    inner, outer = logs[:, radius < np.sqrt(2 / np.pi)], logs[:, radius >= np.sqrt(2 / np.pi)]
    means = inner.mean(axis=1), outer.mean(axis=1)
    return np.concatenate(
        [*means, inner.std(axis=1), outer.std(axis=1), means[0] - means[1]], axis=1
    )


def _rings(pixels: np.ndarray) -> np.ndarray:
    light = pixels @ LUMINANCE
    light = light / light.mean(axis=(1, 2), keepdims=True).clip(1.0)
    down, right = np.gradient(light, axis=(1, 2))
    radius, x, y = _radius(pixels.shape[1])
    outward = right * x + down * y
    rings = np.minimum((radius / np.sqrt(2) * RINGS).astype(int), RINGS - 1)
    found = [values[:, rings == ring].mean(axis=1) for values in (light, outward)
             for ring in range(RINGS)]  # fmt: skip
    return np.stack(found, axis=1)


def _oriented(pixels: np.ndarray) -> np.ndarray:
    light = np.log(pixels @ LUMINANCE + 4.0)
    down, right = np.gradient(light, axis=(1, 2))
    strength = np.hypot(right, down)
    angle = np.arctan2(down, right) % np.pi
    bins = np.minimum((angle / np.pi * ORIENTATIONS).astype(int), ORIENTATIONS - 1)
    count, size = pixels.shape[0], pixels.shape[1] // CELLS * CELLS
    histograms = []
    for orientation in range(ORIENTATIONS):
        chosen = np.where(bins == orientation, strength, 0.0)[:, :size, :size]
        cells = chosen.reshape(count, CELLS, size // CELLS, CELLS, size // CELLS)
        histograms.append(cells.sum(axis=(2, 4)))
    cells = np.stack(histograms, axis=-1)
    length = np.sqrt((cells**2).sum(axis=-1, keepdims=True) + 1e-4)
    return (cells / length).reshape(count, -1)
