"""Split-conformal intervals of sizes, the classes that follow from them, and abstention.

Tables show whether intervals hold in groups, under shifts and after abstention.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta

from core_gates.errors import GatesError
from endoscopy.evaluation.size_scores import size_scores
from endoscopy.metrics import CONTINUOUS, TRUTH, CutOffs, flags_of, object_table, patients_of
from harness.evidence import Interval, Resamples, moments

MINIMUM = 200
SHORT_TRACKS = 0.1
"""Fraction of calibration objects that may have fewer frames than usual."""


@dataclass(frozen=True)
class SplitConformal:
    """Intervals ``[p exp(-q), p exp(q)]`` around the predicted size p of an object.

    q is the ``⌈(n + 1) c⌉``-th smallest of the |log p - log t| of n calibration objects, none of
    which the model was trained on. Then the true size of an object that is exchangeable with them
    lies inside with probability c at least (Papadopoulos et al., 2002). Nothing is guaranteed
    for other objects, such as of another exposure or brand. An object that is seen on fewer frames
    than usual has the wider interval of calibration objects of which as few frames were drawn.

    Args:
        residuals: (n,) log p - log t of the calibration objects, ascending.
        coverage: Nominal coverage c.
        few_frames: (k, half width) of objects of k frames, ascending; see
            `calibrate_few_frames`.
        usual_frames: Objects of as many frames or more have the half width q.

    Raises:
        ValueError: The coverage is not between 0 and 1, or more than n objects can give, or a
            number is not finite.
    """

    residuals: tuple[float, ...]
    coverage: float = 0.9
    few_frames: tuple[tuple[int, float], ...] = ()
    usual_frames: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, got {self.coverage}")
        widths = [width for _, width in self.few_frames]
        if not np.isfinite([*self.residuals, *widths]).all():
            raise ValueError("residuals and half widths must be finite")
        if self._rank > len(self.residuals):
            raise ValueError(f"{len(self.residuals)} objects cannot give {self.coverage:.0%}")

    @property
    def _rank(self) -> int:
        return int(np.ceil((len(self.residuals) + 1) * self.coverage - 1e-9))

    @property
    def half_width(self) -> float:
        """The half width q in log size."""
        return float(np.sort(np.abs(self.residuals))[self._rank - 1])

    def calibration_spread(self, level: float = 0.95) -> tuple[float, float]:
        """Return how far coverage varies below and above its mean with the calibration objects.

        Args:
            level: Fraction of calibration sets that lie between.
        """
        rank, count = self._rank, len(self.residuals)
        tail = (1 - level) / 2
        low, high = beta.ppf([tail, 1 - tail], rank, count + 1 - rank)
        mean = rank / (count + 1)
        return float(mean - low), float(high - mean)

    def interval(
        self, predicted_mm: np.ndarray, num_frames: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return lower and upper bounds, mm.

        Args:
            predicted_mm: Sizes of objects, of any shape.
            num_frames: On how many frames each object was seen; as many as usual by default.
        """
        widths = np.full(np.shape(predicted_mm), self.half_width)
        if num_frames is not None:
            for k, width in self.few_frames:
                widths = np.where(
                    (num_frames >= k) & (num_frames < self.usual_frames), width, widths
                )
        return predicted_mm / np.exp(widths), predicted_mm * np.exp(widths)

    def probabilities(self, predicted_mm: np.ndarray, cut_offs: CutOffs = TRUTH) -> np.ndarray:
        """Return the probabilities of the three classes, from the calibration residuals.

        One is added to the count of each class, so that no probability is exactly zero.

        Args:
            predicted_mm: (N,).
            cut_offs: Of the true sizes.

        Returns:
            (N, 3), rows summing to one.
        """
        log_size = np.log(predicted_mm)[:, None] - np.asarray(self.residuals)
        large = (log_size >= np.log(cut_offs.large)).sum(1)
        diminutive = (log_size <= np.log(cut_offs.small)).sum(1)
        counts = np.stack([diminutive, log_size.shape[1] - diminutive - large, large], 1) + 1.0
        return counts / counts.sum(1, keepdims=True)

    def state(self) -> dict[str, Any]:
        """Return plain numbers for a JSON file."""
        return {
            "coverage": self.coverage,
            "residuals": list(self.residuals),
            "few_frames": [list(pair) for pair in self.few_frames],
            "usual_frames": self.usual_frames,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SplitConformal":
        """Build it from `state`."""
        return cls(
            tuple(float(value) for value in state["residuals"]),
            float(state["coverage"]),
            tuple((int(k), float(width)) for k, width in state.get("few_frames", [])),
            int(state.get("usual_frames", 1)),
        )


def calibrate(
    objects: pd.DataFrame,
    *,
    training_ids: Collection[str],
    coverage: float = 0.9,
    minimum: int = MINIMUM,
) -> SplitConformal:
    """Fit intervals to the predictions of calibration objects.

    Args:
        objects: Object table: unique_id, gt, predicted_mm, optional censored, whose lower bounds
            are left out, and abstained, whose objects are left out too.
        training_ids: Objects that the model was trained on.
        coverage: Nominal coverage.
        minimum: Smallest number of objects with a known size.

    Raises:
        GatesError: There are fewer objects, or the model was trained on some.
    """
    if seen := set(objects["unique_id"]) & set(training_ids):
        raise GatesError(
            f"{len(seen)} of {len(objects)} calibration objects were trained on, such as"
            f" {min(map(str, seen))}; calibrate on others"
        )
    usable = np.ones(len(objects), dtype=bool)
    for column in ("censored", "abstained"):
        usable &= ~flags_of(objects, column)
    if usable.sum() < minimum:
        raise GatesError(
            f"found {usable.sum()} calibration objects with a known size, expected at least"
            f" {minimum}: hold out more objects, or report sizes without intervals"
        )
    kept = objects[usable]
    residuals = np.log(kept["predicted_mm"].to_numpy(float)) - np.log(kept["gt"].to_numpy(float))
    return SplitConformal(tuple(np.sort(residuals).tolist()), coverage)


def draw_frames(frames: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return k frames of every object, or all that it has, drawn at random, the same each time."""
    drawn = frames.sample(frac=1.0, random_state=k).groupby("unique_id", sort=False).head(k)
    return drawn.sort_index()


def calibrate_few_frames(conformal: SplitConformal, frames: pd.DataFrame) -> SplitConformal:
    """Fit half widths for objects of 1, 2, 4, ... frames, as far as whole tracks are longer.

    None is narrower than one for more frames, as some would be by chance.

    Args:
        conformal: Fitted to the same objects by `calibrate`.
        frames: Predictions of their frames, as for `endoscopy.metrics.object_table`.
    """
    lengths = frames.groupby("unique_id").size().to_numpy()
    usual = int(np.quantile(lengths, SHORT_TRACKS, method="lower"))
    widths: list[tuple[int, float]] = []
    widest = conformal.half_width
    for k in reversed([2**i for i in range(usual.bit_length()) if 2**i < usual]):
        objects = object_table(draw_frames(frames, k))
        few = calibrate(objects, training_ids=(), coverage=conformal.coverage, minimum=0)
        widest = max(widest, few.half_width)
        widths.append((k, widest))
    return replace(conformal, few_frames=tuple(reversed(widths)), usual_frames=usual)


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
    return np.where(censored, gt <= high, (low <= gt) & (gt <= high))


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
    scores = [
        moments(is_covered(table, conformal), name="coverage")
        for table, conformal in zip(objects, conformals, strict=True)
    ]
    draws = Resamples.clusters(patients_of(objects[0]), resamples=resamples)
    interval = draws.intervals(scores)["coverage"]
    down, up = max(conformal.calibration_spread() for conformal in conformals)
    low = interval.value - np.hypot(interval.value - interval.low, down)
    high = interval.value + np.hypot(interval.high - interval.value, up)
    return interval._replace(low=float(np.maximum(low, 0.0)), high=float(np.minimum(high, 1.0)))


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


def abstention_table(predictions: pd.DataFrame, *, cut_offs: CutOffs = CONTINUOUS) -> pd.DataFrame:
    """Tabulate abstentions of frames and of objects, all of whose frames abstain.

    Args:
        predictions: One row per frame with a column ``reasons``: empty, or reasons separated by
            semicolons.
        cut_offs: Of the predictions.

    Returns:
        Rows ``any`` and every reason, by number of frames, then ``accepted``. Columns reason,
        frames, frame_rate, objects, object_rate, and MAPE and macro F1 of those objects.
    """
    reasons = predictions["reasons"].fillna("").astype(str)
    lists = reasons.str.split(";").map(lambda parts: {p.strip() for p in parts} - {""})
    objects = object_table(predictions)
    every = predictions["unique_id"].to_numpy()
    counts = pd.Series([r for reasons in lists for r in reasons], dtype=str).value_counts()
    frames_of = {"any": (lists.map(len) > 0).to_numpy()} | {
        str(reason): lists.map(lambda reasons, r=reason: r in reasons).to_numpy()
        for reason in counts.index
    }
    abstained = set(objects.loc[objects["abstained"], "unique_id"])
    rows = []
    for reason, frames in frames_of.items():
        hit = objects["unique_id"].isin(abstained & set(every[frames])).to_numpy()
        rows.append(_row(reason, frames, objects, hit, cut_offs))
    accepted = ~objects["abstained"].to_numpy()
    rows.append(_row("accepted", ~frames_of["any"], objects, accepted, cut_offs))
    return pd.DataFrame(rows)


def _row(
    reason: str, frames: np.ndarray, objects: pd.DataFrame, hit: np.ndarray, cut_offs: CutOffs
) -> dict[str, object]:
    row = {
        "reason": reason,
        "frames": int(frames.sum()),
        "frame_rate": float(frames.mean()),
        "objects": int(hit.sum()),
        "object_rate": float(hit.mean()),
        "mape": float("nan"),
        "macro_f1": float("nan"),
    }
    if hit.any():
        scores = size_scores(objects[hit], cut_offs)(np.ones((1, int(hit.sum()))))
        row |= {name: float(scores[name][0]) for name in ("mape", "macro_f1")}
    return row
