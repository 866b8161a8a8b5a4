"""Rows of an evaluation: intervals of all methods, and what they gain over one of them.

A test of signs, and what many comparisons do to a p.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from harness.evidence.bootstrap import Resamples, Scores
from harness.evidence.rows import Row


def holm(p: ArrayLike) -> np.ndarray:
    """Correct the p of several comparisons step by step (Holm, 1979).

    Args:
        p: (N,); NaN stays NaN and counts as no comparison.

    Returns:
        Corrected p (N,), in the same order, at most 1.

    Raises:
        ValueError: A p lies outside 0 to 1.
    """
    values = np.asarray(p, dtype=float)
    if ((values < 0) | (values > 1)).any():
        raise ValueError(f"p lies between 0 and 1, found {values.min()} to {values.max()}")
    order = np.argsort(values, kind="stable")[: np.isfinite(values).sum()]  # NaN is sorted last
    factors = np.arange(len(order), 0, -1)
    corrected = np.full(values.shape, np.nan)
    corrected[order] = np.maximum.accumulate(np.minimum(values[order] * factors, 1.0))
    return corrected


def compare(
    scores: Mapping[str, Scores | Sequence[Scores]],
    draws: Resamples,
    *,
    task: str,
    reference: str | None = None,
) -> list[Row]:
    """Return the rows of a task: every score of every method, then the paired differences.

    Args:
        scores: Method to its scores, one for each seed. A method with one of them is compared with
            every seed of the reference, or the other way round; one with none is left out.
        draws: Resamples of the samples that all methods share.
        task: Name of the rows.
        reference: Method that is subtracted from all others; no differences by default.

    Returns:
        Rows of intervals, method by method; with a reference, rows of differences, whose ``versus``
        is the reference and whose ``p`` is corrected, metric by metric, for the number of methods
        compared (Holm).

    Raises:
        ValueError: The reference is not among the methods, or seeds cannot be paired.
    """
    if reference is not None and reference not in scores:
        raise ValueError(f"reference {reference!r} is none of {', '.join(scores)}")
    samples = {
        method: draws.sampled(per_seed)
        for method, per_seed in scores.items()
        if callable(per_seed) or len(per_seed)
    }
    rows = [
        Row(method, task, metric, *interval)
        for method, sample in samples.items()
        for metric, interval in draws.intervals(sample).items()
    ]
    if reference is None or reference not in samples:
        return rows
    differences = {
        (method, metric): gap
        for method, sample in samples.items()
        if method != reference
        for metric, gap in draws.differences(sample, samples[reference]).items()
    }
    corrected: dict[tuple[str, str], float] = {}
    for metric in {metric for _, metric in differences}:
        compared = [key for key in differences if key[1] == metric]
        holms = holm([differences[key].p for key in compared]).tolist()
        corrected |= dict(zip(compared, holms, strict=True))
    return rows + [
        Row(method, task, metric, gap.value, gap.low, gap.high, gap.units, reference,
            corrected[method, metric])
        for (method, metric), gap in differences.items()
    ]  # fmt: skip
