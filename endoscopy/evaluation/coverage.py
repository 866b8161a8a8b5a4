"""Whether conformal intervals hold, in groups, under shifts, and after abstention."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from endoscopy.evaluation.conformal import SplitConformal
from endoscopy.metrics import TRUTH, clusters_of, flags_of
from harness.evidence import Interval, Resamples, Scores, moments


def bounds(objects: pd.DataFrame, conformal: SplitConformal) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds (N,) of each object, mm, by its ``num_frames`` if the table has them."""
    num_frames = objects["num_frames"].to_numpy() if "num_frames" in objects else None
    return conformal.interval(objects["predicted_mm"].to_numpy(float), num_frames)


def crossed(low: np.ndarray, high: np.ndarray) -> list[str]:
    """Return the cut-offs of the true classes inside each interval, as ``5 and 10 mm``; or empty.

    Args:
        low: Lower bounds (N,), mm.
        high: Upper bounds (N,), mm.
    """
    small = (low <= TRUTH.small) & (high > TRUTH.small)
    large = (low < TRUTH.large) & (high >= TRUTH.large)
    names = {0: "", 1: f"{TRUTH.small:g} mm", 2: f"{TRUTH.large:g} mm",
             3: f"{TRUTH.small:g} and {TRUTH.large:g} mm"}  # fmt: skip
    return [names[int(key)] for key in small + 2 * large]


def is_covered(objects: pd.DataFrame, conformal: SplitConformal) -> np.ndarray:
    """Return whether the interval of each object (N,) covers its size or reaches its bound."""
    low, high = bounds(objects, conformal)
    gt = objects["gt"].to_numpy(float)
    censored = flags_of(objects, "censored")
    covered: np.ndarray = np.where(censored, gt <= high, (low <= gt) & (gt <= high))
    return covered


def coverage_interval(
    objects: Sequence[pd.DataFrame],
    conformals: Sequence[SplitConformal],
    *,
    resamples: int = 2000,
) -> Interval:
    """Return the coverage, the mean over seeds, with a 95 % interval.

    The interval counts the sampling of the test patients, by a bootstrap, and that of the
    calibration objects: the coverage of split-conformal intervals varies from calibration set to
    calibration set as Beta(k, n + 1 - k), with k the rank of the half width among n (Vovk, 2012).
    Seeds share their calibration objects, so that their variation does not average out. Both add in
    quadrature.

    Args:
        objects: Object table of each seed, the same objects in the same order.
        conformals: Intervals of each seed.
        resamples: Number of bootstrap resamples.
    """

    def score(table: pd.DataFrame, conformal: SplitConformal) -> Scores:
        return moments(is_covered(table, conformal), name="coverage")

    scores = [score(table, one) for table, one in zip(objects, conformals, strict=True)]
    draws = Resamples.clusters(clusters_of(objects[0]), resamples=resamples)
    found = draws.intervals(scores)["coverage"]
    down, up = max(one.calibration_spread() for one in conformals)
    low = found.value - np.hypot(found.value - found.low, down)
    high = found.value + np.hypot(found.high - found.value, up)
    return found._replace(low=float(np.maximum(low, 0.0)), high=float(np.minimum(high, 1.0)))


def coverage_note(task: str, found: tuple[float, float, float], nominal: float) -> str:
    """Return a sentence if the interval of the coverage excludes the nominal one, else nothing.

    Args:
        task: What was scored.
        found: Coverage, and the ends of its interval.
        nominal: Nominal coverage of the intervals.
    """
    value, low, high = found
    if low <= nominal <= high or not np.isfinite([low, high]).all():
        return ""
    side = "fewer" if value < nominal else "more"
    return (
        f"{task}: the {nominal:.0%} intervals cover {value:.3f} [{low:.3f}, {high:.3f}] of the true"
        f" sizes, {side} than they promise."
    )


def coverage_table(
    objects: pd.DataFrame,
    conformal: SplitConformal,
    *,
    by: str | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Tabulate coverage with 95 % intervals over patients.

    An interval covers a size that is a lower bound if it reaches it. A size is undecided if its
    interval crosses 5 or 10 mm.

    Args:
        objects: Object table, optional ``abstained``.
        conformal: Calibrated on other objects.
        by: A column, such as brand or exposure, for rows of its values next to those of all.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows: all; accepted and abstained, if objects abstain; every value of ``by``. Columns group,
        objects, coverage, low, high, nominal, undecided.
    """
    low, high = bounds(objects, conformal)
    undecided = TRUTH.classes(low) != TRUTH.classes(high)
    groups = {"all": np.ones(len(objects), dtype=bool)}
    if "abstained" in objects and objects["abstained"].any():
        abstained = flags_of(objects, "abstained")
        groups |= {"accepted": ~abstained, "abstained": abstained}
    if by is not None:
        values = objects[by].astype(str)
        groups |= {f"{by} {v}": (values == v).to_numpy() for v in sorted(values.unique())}
    rows = []
    for name, inside in groups.items():
        if not inside.any():
            continue
        share = coverage_interval([objects[inside]], [conformal], resamples=resamples)
        rows.append(
            {"group": name, "objects": int(inside.sum())}
            | dict(zip(("coverage", "low", "high"), share[:3], strict=True))
            | {"nominal": conformal.coverage, "undecided": float(undecided[inside].mean())}
        )
    return pd.DataFrame(rows)
