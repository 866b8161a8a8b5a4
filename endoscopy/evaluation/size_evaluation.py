"""All scores of an evaluation of sizing networks, from tables of predictions, and its headline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from endoscopy.evaluation.baselines import REGRESSION, baseline_predictions, cue_baselines
from endoscopy.evaluation.conformal import (
    SplitConformal,
    abstention_table,
    coverage_interval,
    coverage_note,
    coverage_table,
    draw_frames,
)
from endoscopy.evaluation.rendered_frames import FrameStack, frame_features
from endoscopy.evaluation.size_scores import (
    COLUMNS,
    score_differences,
    score_intervals,
    subgroup_table,
)
from endoscopy.metrics import (
    CLASS_NAMES,
    CONTINUOUS,
    PUBLISHED,
    TRUTH,
    CutOffs,
    count_on_cut_offs,
    object_table,
    patient_table,
    patients_of,
)
from harness.evidence import Bar, Row, holm

SCORES = ("macro_f1", "mape")
Tables = pd.DataFrame | Sequence[pd.DataFrame]


def headline(
    model: Tables,
    constant: Tables,
    area: Tables,
    *,
    regression: Tables | None = None,
    name: str = "model",
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> str:
    """Summarize in one line what is reached without a network, and whether the model is better.

    The model is called significantly better than the constant only if both paired differences, in
    macro F1 and in MAPE, are significant and have the right sign.

    Args:
        model: Object table of the model, or one for each seed.
        constant: Object table of the constant baseline, same objects, or one for each seed.
        area: That of the area baseline.
        regression: That of a regression on the area and two brightnesses, where there is one.
        name: Of the model.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.
    """
    parts = []
    others = [("constant", constant), ("area alone", area)]
    others += [("area and brightness", regression)] if regression is not None else []
    for title, tables in (*others, (name, model)):
        scores = score_intervals(tables, cut_offs, only=SCORES, resamples=resamples)
        f1, mape = scores["macro_f1"], scores["mape"]
        parts.append(f"{title}: macro F1 {f1.value:.3f} [{f1.low:.3f}, {f1.high:.3f}], "
                     f"MAPE {mape.value:.3f}")  # fmt: skip
    names = ("the constant", "the area", "the regression on area and brightness")
    verdicts = [
        f"{verdict(model, tables, cut_offs=cut_offs, resamples=resamples)} than {title}"
        for title, (_, tables) in zip(names, others, strict=False)
    ]
    return f"{'; '.join(parts)}; the {name} is {', '.join(verdicts[:-1])} and {verdicts[-1]}."


def verdict(
    model: Tables, baseline: Tables, *, cut_offs: CutOffs = CONTINUOUS, resamples: int = 2000
) -> str:
    """Return ``significantly better``, ``significantly worse`` or ``NOT significantly better``."""
    gaps = score_differences(model, baseline, cut_offs, only=SCORES, resamples=resamples)
    f1, mape = gaps["macro_f1"], gaps["mape"]
    if f1.significant and mape.significant:
        if mape.value < 0 < f1.value:
            return "significantly better"
        if f1.value < 0 < mape.value:
            return "significantly worse"
    return "NOT significantly better"


def cut_off_note(objects: pd.DataFrame, cut_offs: CutOffs) -> str:
    """Return which cut-offs were used and how many objects lie exactly on those of the truth."""
    on = count_on_cut_offs(objects["gt"].to_numpy(float)).items()
    exact = ", ".join(f"{count} on {cut:g} mm" for cut, count in on)
    return (
        f"classes of the truth at {TRUTH}, of predictions at {cut_offs}; of {len(objects)} objects"
        f" {exact} exactly."
    )


TEST = "test"
BASELINES = ("constant", "area")
ACCURACY = ("macro_f1", "mape", "f1_5mm", "f1_10mm", "mae_mm", "bias_mm")
CERTAINTY = (
    *("coverage", "coverage_accepted", "coverage_abstained"),
    *("abstained", "mape_accepted", "mape_abstained"),
)
"""Scores of the intervals and of abstention, which only the main network has."""

HEADLINE = (*ACCURACY, *CERTAINTY)
SECONDARY = (
    *(f"macro_f1 at {cuts.small:g}/{cuts.large:g}" for cuts in (CONTINUOUS, PUBLISHED)),
    *("weighted_f1_10mm", "balanced_accuracy", "quadratic_kappa"),
    *("auroc_5mm", "auroc_10mm", *(f"sensitivity_{name}" for name in CLASS_NAMES)),
    *("rmse_mm", "limit_low_ratio", "limit_high_ratio"),
)  # fmt: skip
"""Scores of the test objects that tables show after those of ``HEADLINE``."""

COMPARED = ACCURACY
FRAME_SCORES = ("macro_f1", "weighted_f1", "weighted_f1_10mm", "mape", "mae_mm")
OF_QUALITY = ["reasons", "sharpness"]


@dataclass
class Bars:
    """What the main network must reach on the test objects, on average over seeds.

    Args:
        macro_f1: Smallest macro F1 of objects.
        mape: Largest mean relative error.
        crop_macro_f1: Largest macro F1 of the network that sees only the crop.
        coverage: Smallest and largest coverage of 90 % intervals.
    """

    macro_f1: float | None = None
    mape: float | None = None
    crop_macro_f1: float | None = None
    coverage: tuple[float, float] | None = None


def nothing() -> None:
    """Do nothing, instead of moving a progress bar."""


class SizeEvaluation:
    """Collect predictions of networks and of their baselines, and score them together.

    Args:
        main: The network to which intervals, abstention and bars refer, the first that is added.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Attributes:
        predictions: (task, method, seed) to predictions of frames; seed 0 of baselines.
        intervals: Seed to the intervals of the main network; its coverage is scored where every
            seed has some.
    """

    def __init__(self, main: str, cut_offs: CutOffs = CONTINUOUS, resamples: int = 2000) -> None:
        self.main, self.cut_offs, self.resamples = main, cut_offs, resamples
        self.predictions: dict[tuple[str, str, int], pd.DataFrame] = {}
        self.intervals: dict[int, SplitConformal] = {}
        self._rows: list[Row] | None = None

    def add(self, task: str, method: str, seed: int, found: pd.DataFrame) -> None:
        """Keep predictions of frames, those of several folds together.

        Args:
            task: ``test``, or a shift.
            method: Name of the network.
            seed: Of its training.
            found: Columns of `endoscopy.metrics.object_table`.
        """
        before = self.predictions.get((task, method, seed))
        joined = found if before is None else pd.concat([before, found], ignore_index=True)
        self.predictions[task, method, seed] = joined
        self._rows = None

    def add_baselines(self, task: str, train: pd.DataFrame, found: pd.DataFrame) -> None:
        """Add a constant and the apparent area, fitted to training frames.

        Args:
            task: Task of ``found``.
            train: Rows of the frame table.
            found: Predictions of any network, whose frames are predicted.
        """
        test = found.drop(columns=OF_QUALITY, errors="ignore")
        for name, predicted in baseline_predictions(train, test).items():
            self.add(task, name, 0, predicted)

    def add_cues(self, parts: Sequence[FrameStack], found: pd.DataFrame) -> None:
        """Add regressions on masks, brightness and depth, where all are known.

        Args:
            parts: Training, validation and test frames; the last are those of the rows of
                ``found``.
            found: Predictions of any network.
        """
        frames = found.drop(columns=OF_QUALITY, errors="ignore")
        for name, sizes in cue_baselines(*map(frame_features, parts)).items():
            if name not in BASELINES:
                self.add(TEST, name, 0, frames.assign(predicted_mm=sizes))

    def table(self) -> pd.DataFrame:
        """Return all predictions in one table with the columns task, variant and seed."""
        return pd.concat(
            [
                frames.assign(task=task, variant=method, seed=seed)
                for (task, method, seed), frames in self.predictions.items()
            ],
            ignore_index=True,
        )

    def objects(self, task: str, method: str) -> list[pd.DataFrame]:
        """Return the object table of every seed, including frames that abstain."""
        return [
            object_table(frames.drop(columns=["reasons"], errors="ignore"))
            for frames in self.frames(task, method)
        ]

    def frames(self, task: str, method: str) -> list[pd.DataFrame]:
        """Return the predictions of frames, one table per seed."""
        return [
            frames
            for (of, name, _), frames in self.predictions.items()
            if (of, name) == (task, method)
        ]

    @property
    def headline(self) -> str:
        """The first line of every report: the baselines, and whether the network is better."""
        constant, area = (self.objects(TEST, name)[0] for name in BASELINES)
        regression = self.objects(TEST, REGRESSION)
        return headline(
            self.objects(TEST, self.main),
            constant,
            area,
            regression=regression[0] if regression else None,
            cut_offs=self.cut_offs,
            resamples=self.resamples,
        )

    @property
    def note(self) -> str:
        """Which cut-offs were used, and where intervals cover less or more than nominally."""
        notes = [cut_off_note(self.objects(TEST, self.main)[0], self.cut_offs)]
        for row in self.rows():
            if row.metric == "coverage" and row.method == self.main:
                nominal = next(iter(self.intervals.values())).coverage
                notes.append(coverage_note(row.task, (row.value, row.low, row.high), nominal))
        return " ".join(note for note in notes if note)

    def rows(self, tick: Callable[[], None] = nothing) -> list[Row]:
        """Return every score of every method and task, over objects, frames and patients.

        Those of ``HEADLINE`` come first, in its order, which is that of the columns of tables.

        Args:
            tick: Called after each method of each task.
        """
        if self._rows is None:
            rows: list[Row] = []
            for task, method in self.pairs():
                tables = self.objects(task, method)
                rows += self._score(method, task, tables)
                if task == TEST:
                    rows += self._other_cut_offs(method, tables) + self._levels(method, tables)
                if method == self.main:
                    rows += self._coverages(task, tables) + self._abstentions(task)
                tick()
            order = {metric: place for place, metric in enumerate(HEADLINE)}
            rows += self._differences()
            self._rows = sorted(rows, key=lambda row: order.get(row.metric, len(order)))
        return self._rows

    def pairs(self) -> list[tuple[str, str]]:
        """Return every task with every method of it."""
        return list(dict.fromkeys((task, method) for task, method, _ in self.predictions))

    def subgroups(self) -> pd.DataFrame | None:
        """Return scores of shapes, sites, brands and distances; None if none of them varies.

        They are those of the first seed of the main network.
        """
        objects = self.objects(TEST, self.main)[0]
        varied = [c for c in COLUMNS if c in objects and objects[c].nunique() > 1]
        if not varied:
            return None
        return subgroup_table(
            objects, varied, cut_offs=self.cut_offs, resamples=min(self.resamples, 500)
        )

    def bars(self, bars: Bars) -> list[Bar]:
        """Return the bars, met or missed, of the methods that were compared."""
        main, crop = self.main, bars.crop_macro_f1 if (TEST, "crop") in self.pairs() else None
        low, high = bars.coverage or (None, None)
        wanted: tuple[tuple[str, str, str, Literal["<=", ">="], float | None], ...] = (
            ("macro F1 of objects, mean over seeds", main, "macro_f1", ">=", bars.macro_f1),
            ("MAPE of objects, mean over seeds", main, "mape", "<=", bars.mape),
            ("macro F1 of the crop only", "crop", "macro_f1", "<=", crop),
            ("coverage of 90 % intervals, at least", main, "coverage", ">=", low),
            ("coverage of 90 % intervals, at most", main, "coverage", "<=", high),
        )
        return [
            Bar(name, self._value(method, metric), side, limit)
            for name, method, metric, side, limit in wanted
            if limit is not None
        ]

    def _score(
        self,
        method: str,
        task: str,
        tables: list[pd.DataFrame],
        only: Sequence[str] | None = None,
    ) -> list[Row]:
        intervals = score_intervals(tables, self.cut_offs, only=only, resamples=self.resamples)
        return [Row(method, task, name, *values) for name, values in intervals.items()]

    def _other_cut_offs(self, method: str, tables: list[pd.DataFrame]) -> list[Row]:
        rows = []
        for other in {CONTINUOUS, PUBLISHED} - {self.cut_offs}:
            intervals = score_intervals(tables, other, only=("macro_f1",), resamples=self.resamples)
            name = f"macro_f1 at {other.small:g}/{other.large:g}"
            rows.append(Row(method, TEST, name, *intervals["macro_f1"]))
        return sorted(rows, key=lambda row: row.metric)

    def _levels(self, method: str, tables: list[pd.DataFrame]) -> list[Row]:
        frames = [
            frames.drop(columns=["reasons"], errors="ignore")
            for frames in self.frames(TEST, method)
        ]
        rows = self._score(method, f"{TEST}, frames", frames, FRAME_SCORES)
        if len(set(patients_of(tables[0]))) < len(tables[0]):
            patients = [patient_table(table) for table in tables]
            rows += self._score(method, f"{TEST}, patients", patients)
        return rows

    def _differences(self) -> list[Row]:
        """Return networks and the regression minus the main network, paired by patient and seed."""
        main, differences = self.objects(TEST, self.main), {}
        for task, name in self.pairs():
            if task != TEST or name in (*BASELINES, self.main):
                continue
            tables = self.objects(TEST, name) * (len(main) if name == REGRESSION else 1)
            if len(tables) == len(main):
                differences[name] = score_differences(
                    tables, main, self.cut_offs, only=COMPARED, resamples=self.resamples
                )
        return [
            Row(name, TEST, metric, gap.value, gap.low, gap.high, gap.units, self.main, p)
            for metric in COMPARED
            for (name, gaps), p in zip(
                differences.items(),
                holm([gaps[metric].p for gaps in differences.values()]),
                strict=True,
            )
            for gap in [gaps[metric]]
        ]

    def _coverages(self, task: str, tables: list[pd.DataFrame]) -> list[Row]:
        """Return coverage and width of the intervals; none where a seed has no intervals."""
        seeds = [seed for of, name, seed in self.predictions if (of, name) == (task, self.main)]
        conformals = [self.intervals[seed] for seed in seeds if seed in self.intervals]
        if len(conformals) < len(tables):
            return []
        interval = coverage_interval(tables, conformals, resamples=self.resamples)
        rows = [Row(self.main, task, "coverage", *interval)]
        factor = float(np.mean([np.exp(conformal.half_width) for conformal in conformals]))
        rows.append(Row(self.main, task, "interval_factor", factor, n=len(conformals)))
        frames = self.frames(task, self.main)
        if task == TEST:
            single = [object_table(draw_frames(table, 1)) for table in frames]
            interval = coverage_interval(single, conformals, resamples=self.resamples)
            rows.append(Row(self.main, f"{TEST}, frames", "coverage", *interval))
        if "reasons" in frames[0]:
            groups = coverage_table(
                object_table(frames[0]), conformals[0], resamples=self.resamples
            ).set_index("group")
            for name, group in groups.drop(index="all").iterrows():
                shares = (group["coverage"], group["low"], group["high"], int(group["objects"]))
                rows.append(Row(self.main, task, f"coverage_{name}", *shares))
        return rows

    def _abstentions(self, task: str) -> list[Row]:
        """Return how often the first seed abstains and why, and what it gains."""
        frames = [table for table in self.frames(task, self.main) if "reasons" in table]
        if not frames:
            return []
        table = abstention_table(frames[0], cut_offs=self.cut_offs).set_index("reason")
        rows = [
            Row(self.main, task, "abstained" if reason == "any" else f"abstained: {reason}",
                float(row["frame_rate"]), n=frames[0]["unique_id"].nunique())
            for reason, row in table.iterrows() if reason != "accepted"
        ]  # fmt: skip
        for reason, name in (("accepted", "mape_accepted"), ("any", "mape_abstained")):
            error, objects = (float(table[column][reason]) for column in ("mape", "objects"))
            if np.isfinite(error):
                rows.append(Row(self.main, task, name, error, n=int(objects)))
        return rows

    def _value(self, method: str, metric: str) -> float:
        values = (r.value for r in self.rows() if r[:3] == (method, TEST, metric))
        return next(values, float("nan"))
