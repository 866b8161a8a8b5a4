"""Weights of samples that are drawn in whole clusters, or in blocks of a series."""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np


def draw_clusters(
    index: np.ndarray, units: int, generator: np.random.Generator, count: int
) -> np.ndarray:
    """Return how often each sample (N,) is drawn, (count, N), if whole clusters are drawn.

    Args:
        index: (N,) number of the cluster of each sample.
        units: Number of clusters; as many are drawn.
        generator: Of random numbers.
        count: Number of resamples.
    """
    drawn = generator.integers(units, size=(count, units)) + units * np.arange(count)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)
    return cast(np.ndarray, counts.astype(float)[:, index])


def draw_crossed(
    indices: Sequence[np.ndarray],
    units: Sequence[int],
    generator: np.random.Generator,
    count: int,
) -> np.ndarray:
    """Return how often each sample is drawn, (count, N), if clusters of several kinds are drawn.

    Each kind of clusters is drawn for itself; a sample is drawn as often as the product of its
    clusters (the pigeonhole bootstrap of Owen, 2007).

    Args:
        indices: For each kind, (N,) number of the cluster of each sample.
        units: For each kind, number of its clusters.
        generator: Of random numbers.
        count: Number of resamples.
    """
    drawn = np.ones((count, len(indices[0])))
    for index, own in zip(indices, units, strict=True):
        drawn *= draw_clusters(index, own, generator, count)
    return drawn


def draw_blocks(length: int, block: int, generator: np.random.Generator, count: int) -> np.ndarray:
    """Return how often each of ``length`` samples is drawn, (count, length), in whole blocks.

    Args:
        length: Of the series, and of every resample: the last block drawn is cut.
        block: Length of a block.
        generator: Of random numbers.
        count: Number of resamples.
    """
    num_blocks = -(-length // block)
    starts = generator.integers(length - block + 1, size=(count, num_blocks))
    ends = starts + block
    ends[:, -1] -= block * num_blocks - length
    rows, columns = np.arange(count)[:, None] * (length + 1), count * (length + 1)
    steps = np.bincount((starts + rows).ravel(), minlength=columns) - np.bincount(
        (ends + rows).ravel(), minlength=columns
    )
    return steps.reshape(count, length + 1).cumsum(1)[:, :-1].astype(float)


def numbered(ids: Iterable[object]) -> tuple[np.ndarray, int]:
    """Return the number of the cluster of each sample (N,), and how many clusters there are.

    Args:
        ids: (N,) cluster of each sample, in any type; each missing one is its own cluster.

    Raises:
        ValueError: There is no sample, or not one id per sample.
    """
    labels = np.asarray(ids).tolist() if hasattr(ids, "__array__") else list(ids)
    if not isinstance(labels, list) or any(isinstance(one, list) for one in labels):
        raise ValueError(f"ids have shape {np.shape(labels)}, expected one a sample (N,)")
    if not labels:
        raise ValueError("ids are empty, expected one a sample")
    known = {label for label in labels if not _is_missing(label)}
    try:
        ordered = sorted(known)  # type: ignore[type-var]
    except TypeError:  # of several types
        ordered = sorted(known, key=lambda label: (type(label).__name__, str(label)))
    numbers = {label: number for number, label in enumerate(ordered)}
    index, units = np.empty(len(labels), dtype=np.intp), len(numbers)
    for position, label in enumerate(labels):
        if _is_missing(label):
            index[position], units = units, units + 1
        else:
            index[position] = numbers[label]
    return index, units


def _is_missing(label: object) -> bool:
    if label is None or (isinstance(label, str) and not label):
        return True
    try:
        return bool(label != label)  # NaN and NaT differ from themselves
    except TypeError:  # pandas.NA is neither true nor false
        return True
