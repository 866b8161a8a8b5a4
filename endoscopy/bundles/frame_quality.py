"""Frames from which no size should be read, and why: limits fitted to the training frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from endoscopy.data.images import Frame

OUT_OF_DISTRIBUTION = "out of distribution"
BLURRED = "blurred"
CLIPPED_EXPOSURE = "clipped exposure"
CLIPPED_FRAME = "clipped by the frame"
TOO_NEAR = "too near"
TOO_SMALL = "too small in the frame"

DARK, BRIGHT = 8, 250  # of 255
GROWTH = 0.5  # fraction of the box added on each side: the surroundings show the sharpness too
LUMINANCE = np.array([0.299, 0.587, 0.114])
BLACK = 16.0  # of 255; below, ratios of colors depend on the coding of the file
NOISE = 4.0  # variance of luminance, of 255², that every frame has
SLACK = {"clipped": 0.05, "cut": 0.02}  # fractions that are harmless whatever the training frames
SHRINKAGE = 0.05
NUMBERS = ("distance", "sharpness", "clipped", "cut")  # of limits


@dataclass(frozen=True)
class QualityLimits:
    """Limits on the frames from which a size is read.

    Args:
        mean: (K,) of the statistics of the training frames.
        precision: (K, K), inverse of their covariance.
        distance: Largest Mahalanobis distance.
        sharpness: Smallest sharpness.
        clipped: Largest fraction of dark or saturated pixels around the lesion.
        cut: Largest fraction of the box's perimeter on the edge of the frame.
        area: Smallest and largest fraction of the frame that the box covers.
    """

    mean: np.ndarray
    precision: np.ndarray
    distance: float
    sharpness: float
    clipped: float
    cut: float
    area: tuple[float, float]

    def reasons(self, found: Mapping[str, np.ndarray]) -> list[str]:
        """Return why each frame should not be sized: empty, or reasons separated by "; ".

        Args:
            found: `frame_statistics` of frames resized as for the network.
        """
        checks = (
            (OUT_OF_DISTRIBUTION, self.distances(found["statistics"]) > self.distance),
            (BLURRED, found["sharpness"] < self.sharpness),
            (CLIPPED_EXPOSURE, found["clipped"] > self.clipped),
            (CLIPPED_FRAME, found["cut"] > self.cut),
            (TOO_NEAR, found["area"] > self.area[1]),
            (TOO_SMALL, found["area"] < self.area[0]),
        )
        return [
            "; ".join(reason for reason, flags in checks if flags[row])
            for row in range(len(found["area"]))
        ]

    def distances(self, statistics: np.ndarray) -> np.ndarray:
        """Return the Mahalanobis distances (N,) of statistics (N, K) from the training frames."""
        difference = statistics - self.mean
        return np.sqrt(np.einsum("nk,kj,nj->n", difference, self.precision, difference).clip(min=0))

    def state(self) -> dict[str, Any]:
        """Return plain numbers for a JSON file."""
        return {
            "mean": self.mean.tolist(),
            "precision": self.precision.tolist(),
            "area": list(self.area),
            **{name: getattr(self, name) for name in NUMBERS},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> QualityLimits:
        """Build it from `state`."""
        numbers = {name: float(state[name]) for name in NUMBERS}
        low, high = state["area"]
        mean, precision = np.asarray(state["mean"]), np.asarray(state["precision"])
        return cls(mean, precision, area=(float(low), float(high)), **numbers)


def fit_quality(images: np.ndarray, boxes: np.ndarray, *, rate: float = 0.01) -> QualityLimits:
    """Fit the limits so that each reason holds for a fraction ``rate`` of the training frames.

    Args:
        images: (N, H, W, 3) uint8, resized as for the network, without augmentation.
        boxes: (N, 4) xmin, ymin, xmax, ymax in pixels.
        rate: Fraction of the training frames beyond each limit; for the area, on either side.

    Raises:
        ValueError: There are fewer frames than twice the number of statistics.
    """
    figures = frame_statistics(images, boxes)
    statistics = figures["statistics"]
    count, dim = statistics.shape
    if count < 2 * dim:
        raise ValueError(f"{count} frames are too few to fit {dim} statistics; give {2 * dim}")
    covariance = np.cov(statistics, rowvar=False)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(np.diag(covariance) + 1e-6)
    mean, precision = statistics.mean(axis=0), np.linalg.inv(shrunk)
    limits = QualityLimits(mean, precision, 0.0, 0.0, 0.0, 0.0, (0.0, 1.0))
    low, high = np.quantile(figures["area"], [rate, 1 - rate])
    return QualityLimits(
        mean,
        precision,
        distance=float(np.quantile(limits.distances(statistics), 1 - rate)),
        sharpness=float(np.quantile(figures["sharpness"], rate)),
        clipped=max(float(np.quantile(figures["clipped"], 1 - rate)), SLACK["clipped"]),
        cut=max(float(np.quantile(figures["cut"], 1 - rate)), SLACK["cut"]),
        area=(float(low), float(high)),
    )


def frame_statistics(images: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Measure sharpness, exposure, box and colors of each frame, by the name of the figure.

    Args:
        images: (N, H, W, 3) uint8.
        boxes: (N, 4) xmin, ymin, xmax, ymax in pixels.

    Returns:
        - ``sharpness`` (N,): variance of the Laplacian over the variance of the luminance, around
          the lesion (Pech-Pacheco et al., 2000, relative, so that contrast does not matter);
        - ``clipped`` (N,): fraction of dark or saturated pixels around the lesion;
        - ``cut`` (N,): fraction of the box's perimeter on the edge of the frame;
        - ``area`` (N,): fraction of the frame that the box covers;
        - ``statistics`` (N, K): colors of the frame and around the lesion, and sharpness, the
          space in which frames are compared with those of training.
    """
    height, width = images.shape[1:3]
    rows: list[list[float]] = []
    statistics: list[np.ndarray] = []
    for image, box in zip(images, boxes.astype(float), strict=True):
        part = image[_around(box, height, width)].astype(np.float64)
        luminance = part @ LUMINANCE
        laplacian = ndimage.laplace(luminance, mode="nearest")
        sharpness = laplacian.var() / (luminance.var() + NOISE)
        darkest, brightest = part.max(axis=2), part.min(axis=2)
        clipped = ((darkest <= DARK) | (brightest >= BRIGHT)).mean()
        wide, high = box[2:] - box[:2]
        at_side = (box[0] < 0.5) + (box[2] > width - 0.5)
        at_end = (box[1] < 0.5) + (box[3] > height - 0.5)
        cut = (at_side * high + at_end * wide) / max(2 * (wide + high), 1e-6)
        rows.append([sharpness, clipped, cut, wide * high / (height * width)])
        logarithm = [np.log(sharpness + 1e-3)]
        statistics.append(np.concatenate([_colors(image), _colors(part), logarithm]))
    values = np.array(rows, dtype=np.float64).reshape(-1, 4)
    measured = dict(zip(("sharpness", "clipped", "cut", "area"), values.T, strict=True))
    return measured | {"statistics": np.array(statistics, dtype=np.float64)}


def stacked(frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, H, W, 3) and boxes (N, 4) of frames of one size, to be measured."""
    return np.stack([frame.image for frame in frames]), np.array([frame.box for frame in frames])


def _around(box: np.ndarray, height: int, width: int) -> tuple[slice, slice]:
    """Return the pixels of the grown box, three on each side at least."""
    grow_x, grow_y = GROWTH * (box[2] - box[0]), GROWTH * (box[3] - box[1])
    left = int(np.clip(box[0] - grow_x, 0, width - 3))
    top = int(np.clip(box[1] - grow_y, 0, height - 3))
    right = int(np.clip(np.ceil(box[2] + grow_x), left + 3, width))
    bottom = int(np.clip(np.ceil(box[3] + grow_y), top + 3, height))
    return slice(top, bottom), slice(left, right)


def _colors(pixels: np.ndarray) -> np.ndarray:
    """Return means and deviations of the luminance and of two color ratios (6,)."""
    red, green, blue = pixels.reshape(-1, 3).astype(np.float64).T + BLACK
    values = np.stack(
        [pixels.reshape(-1, 3) @ LUMINANCE / 255, *np.log([red / green, green / blue])]
    )
    return np.concatenate([values.mean(axis=1), values.std(axis=1)])
