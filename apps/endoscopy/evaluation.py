"""Score trained networks beside what they must beat: a constant and the apparent area."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from apps.endoscopy.rendering import Rendering
from apps.endoscopy.training import Sizers, Training
from endoscopy.bundles.building import frame_predictions, part_predictions
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.data.frames.dataset import PolypFrames
from endoscopy.evaluation.abstention import abstention_table
from endoscopy.evaluation.baselines import baseline_predictions
from endoscopy.evaluation.conformal import draw_frames
from endoscopy.evaluation.coverage import coverage_interval
from endoscopy.evaluation.cue_baselines import cue_baselines
from endoscopy.evaluation.features import frame_features
from endoscopy.evaluation.headline import cut_off_note, headline
from endoscopy.evaluation.scores import score_differences, score_intervals
from endoscopy.evaluation.subgroups import COLUMNS, subgroup_table
from endoscopy.inference.in_memory import frames_of
from endoscopy.metrics import (
    CLASS_NAMES,
    CONTINUOUS,
    PUBLISHED,
    CutOffs,
    object_table,
    patient_table,
    patients_of,
)
from harness.evidence.rows import Bar, Row
from harness.runs.ticker import ticking

TEST, DIFFERENCES = "test", "test, differences"
BASELINES = ("constant", "area")
HEADLINE = ("macro_f1", "f1_5mm", "f1_10mm", "mape", "mae_mm", "bias_mm", "coverage", "abstained")
OTHER_CUT_OFFS = tuple(f"macro_f1 at {c.small:g}/{c.large:g}" for c in (CONTINUOUS, PUBLISHED))
SECONDARY = (
    *OTHER_CUT_OFFS, "weighted_f1_10mm", "balanced_accuracy", "quadratic_kappa",
    *("auroc_5mm", "auroc_10mm", *(f"sensitivity_{name}" for name in CLASS_NAMES)),
    *("rmse_mm", "limit_low_mm", "limit_high_mm"),
)  # fmt: skip
"""Figures of the test objects that tables show beside those of ``HEADLINE``."""

COMPARED = ("macro_f1", "f1_5mm", "f1_10mm", "mape", "mae_mm", "bias_mm")
FRAME_SCORES = ("macro_f1", "weighted_f1", "weighted_f1_10mm", "mape", "mae_mm")


@dataclass
class Bars:
    """What the configured network must reach on the test objects, in the mean over seeds.

    Args:
        macro_f1: Least macro F1 of objects.
        mape: Largest mean relative error.
        crop_macro_f1: Largest macro F1 of the network that sees the crop only.
        coverage: Least and largest coverage of 90 % intervals.
    """

    macro_f1: float | None = None
    mape: float | None = None
    crop_macro_f1: float | None = None
    coverage: tuple[float, float] | None = None


class Evaluation:
    """Score variants and seeds on the test part, and the configured variant under shifts.

    Args:
        sizers: Trained networks and their data.
        variants: Names of variants; the first is the one that bars and intervals are about.
        seeds: Seeds of each.
        folds: Folds whose test parts are pooled; none for the configured one.
        cut_offs: Of the predictions.
        resamples: Draws of the bootstrap.
        cues: Score regressions on hand-made cues, too, where the data are rendered.

    Attributes:
        predictions: (task, variant, seed) to predictions of frames; seed 0 of baselines.
    """

    def __init__(
        self,
        sizers: Sizers,
        variants: Sequence[str],
        seeds: Sequence[int],
        folds: Sequence[int] = (),
        cut_offs: CutOffs = CONTINUOUS,
        resamples: int = 2000,
        cues: bool = True,
    ) -> None:
        self.cues = cues
        self.sizers, self.variants, self.seeds = sizers, tuple(variants), tuple(seeds)
        self.folds: tuple[int | None, ...] = tuple(folds) or (None,)
        self.cut_offs, self.resamples = cut_offs, resamples
        self.predictions: dict[tuple[str, str, int], pd.DataFrame] = {}

    @property
    def main(self) -> str:
        """The variant that bars and intervals are about."""
        return self.variants[0]

    def trainings(self) -> list[Training]:
        """Return every training that is scored."""
        return [
            Training(variant, seed, fold=fold)
            for variant in self.variants
            for seed in self.seeds
            for fold in self.folds
        ]

    def run(self, rendering: Rendering | None = None, shifts: Sequence[str] = ()) -> None:
        """Predict everything.

        Args:
            rendering: Where the sets under shifts are.
            shifts: Names of shifts.
        """
        trainings = self.trainings()
        with ticking("predicting", len(trainings) + len(shifts) * len(self.seeds)) as tick:
            for training in trainings:
                self._predict_test(training)
                tick()
            for shift in shifts:
                assert rendering is not None
                frames = rendering.shifted(self.sizers.datamodule, shift)
                self._predict_shift(shift, frames, tick)

    def _predict_test(self, training: Training) -> None:
        bundle, data = self.sizers.load(training), self.sizers.data(training)
        found = part_predictions(bundle, data, "test", reasons=training.variant == self.main)
        self._add((TEST, training.variant, training.seed), found)
        if training.variant == self.main and training.seed == self.seeds[0]:
            self._add_baselines(TEST, data, found)
            if "synthetic" in data.sources and self.cues:
                self._add_cues(data, found)

    def _predict_shift(self, shift: str, frames: PolypFrames, tick: Callable[[], None]) -> None:
        rows = np.arange(len(frames))
        for seed in self.seeds:
            bundle = self.sizers.load(Training(self.main, seed, fold=self.folds[0]))
            found = frame_predictions(bundle, frames, rows, reasons=True)
            self._add((shift, self.main, seed), found)
            tick()
        trained = self.sizers.data(Training(self.main, self.seeds[0], fold=self.folds[0]))
        self._add_baselines(shift, trained, found)

    def _add_baselines(self, task: str, data: PolypSizingDataModule, test: pd.DataFrame) -> None:
        train = data.load().frames.iloc[data.rows("train")]
        test = test.drop(columns=["reasons", "sharpness"], errors="ignore")
        for name, found in baseline_predictions(train, test).items():
            self._add((task, name, 0), found)

    def _add_cues(self, data: PolypSizingDataModule, test: pd.DataFrame) -> None:
        """Add regressions on what masks, brightness and depth tell, where all are known."""
        source = data.variant(streams=("rgb_mask_depth",)).frames()
        train_cues, test_cues = (
            frame_features(frames_of(source, rows))
            for rows in (data.evaluation_rows("train"), data.evaluation_rows("test"))
        )
        test = test.drop(columns=["reasons", "sharpness"], errors="ignore")
        for name, sizes in cue_baselines(train_cues, test_cues).items():
            if name not in BASELINES:
                self._add((TEST, name, 0), test.assign(predicted_mm=sizes))

    def _add(self, key: tuple[str, str, int], found: pd.DataFrame) -> None:
        """Keep predictions, those of several folds together."""
        before = self.predictions.get(key)
        joined = found if before is None else pd.concat([before, found], ignore_index=True)
        self.predictions[key] = joined

    def table(self) -> pd.DataFrame:
        """Return all predictions in one table with the columns task, variant and seed."""
        return pd.concat(
            [
                found.assign(task=task, variant=variant, seed=seed)
                for (task, variant, seed), found in self.predictions.items()
            ],
            ignore_index=True,
        )

    def objects(self, task: str, method: str) -> list[pd.DataFrame]:
        """Return the object table of every seed, no frame left out."""
        return [
            object_table(found.drop(columns=["reasons"], errors="ignore"))
            for (of, name, _), found in self.predictions.items()
            if (of, name) == (task, method)
        ]

    def bundles(self) -> list[SizingBundle]:
        """Return the networks of the main variant, one a seed, of the first fold."""
        return [
            self.sizers.load(Training(self.main, seed, fold=self.folds[0])) for seed in self.seeds
        ]

    @cached_property
    def headline(self) -> str:
        """The first line of every report."""
        constant, area = (self.objects(TEST, name)[0] for name in BASELINES)
        tables = self.objects(TEST, self.main)
        return headline(tables, constant, area, cut_offs=self.cut_offs, resamples=self.resamples)

    @property
    def note(self) -> str:
        """Which cut-offs were used."""
        return cut_off_note(self.objects(TEST, self.main)[0], self.cut_offs)

    @cached_property
    def rows(self) -> list[Row]:
        """Every figure of every method and task, over objects, frames and patients."""
        pairs = dict.fromkeys((task, method) for task, method, _ in self.predictions)
        rows: list[Row] = []
        with ticking("bootstrap", len(pairs)) as tick:
            for task, method in pairs:
                tables = self.objects(task, method)
                rows += self._score(method, task, tables)
                if task == TEST:
                    rows += self._other_cut_offs(method, tables)
                    rows += self._levels(method, tables)
                if method == self.main:
                    rows += self._intervals(task, tables)
                tick()
        return rows + self._differences()

    def _differences(self) -> list[Row]:
        """Return every other variant minus the main one, paired by object, patient and seed."""
        rows: list[Row] = []
        main = self.objects(TEST, self.main)
        for name in self.variants[1:]:
            tables = self.objects(TEST, name)
            found = score_differences(
                tables, main, self.cut_offs, only=COMPARED, resamples=self.resamples
            )
            pair = f"{name} minus {self.main}"
            for metric, (value, low, high, _, units) in found.items():
                rows.append(Row(pair, DIFFERENCES, metric, value, low, high, units))
        return rows

    def subgroups(self) -> pd.DataFrame | None:
        """Return scores of shapes, sites, brands and distances; None if none of them varies.

        They are those of the first seed of the main variant.
        """
        objects = self.objects(TEST, self.main)[0]
        varied = [c for c in COLUMNS if c in objects and objects[c].nunique() > 1]
        if not varied:
            return None
        return subgroup_table(
            objects, varied, cut_offs=self.cut_offs, resamples=min(self.resamples, 500)
        )

    def _score(
        self,
        method: str,
        task: str,
        tables: list[pd.DataFrame],
        only: Sequence[str] | None = None,
    ) -> list[Row]:
        found = score_intervals(tables, self.cut_offs, only=only, resamples=self.resamples)
        return [Row(method, task, name, *values) for name, values in found.items()]

    def _other_cut_offs(self, method: str, tables: list[pd.DataFrame]) -> list[Row]:
        rows = []
        for other in {CONTINUOUS, PUBLISHED} - {self.cut_offs}:
            only = ("macro_f1",)
            found = score_intervals(tables, other, only=only, resamples=self.resamples)
            name = f"macro_f1 at {other.small:g}/{other.large:g}"
            rows.append(Row(method, TEST, name, *found["macro_f1"]))
        return sorted(rows, key=lambda row: row.metric)

    def _levels(self, method: str, tables: list[pd.DataFrame]) -> list[Row]:
        frames = [
            found.drop(columns=["reasons"], errors="ignore") for found in self._frames(TEST, method)
        ]
        rows = self._score(method, f"{TEST}, frames", frames, FRAME_SCORES)
        if len(set(patients_of(tables[0]))) < len(tables[0]):
            patients = [patient_table(table) for table in tables]
            rows += self._score(method, f"{TEST}, patients", patients)
        return rows

    def _intervals(self, task: str, tables: list[pd.DataFrame]) -> list[Row]:
        """Return coverage, width of intervals and abstentions of the main variant."""
        bundles = self.bundles()
        rows = []
        conformals = [bundle.conformal for bundle in bundles if bundle.conformal is not None]
        if len(conformals) == len(bundles) and len(self.folds) == 1:
            found = coverage_interval(tables, conformals, resamples=self.resamples)
            rows.append(Row(self.main, task, "coverage", *found))
            factor = float(np.mean([np.exp(one.half_width) for one in conformals]))
            rows.append(Row(self.main, task, "interval_factor", factor, n=len(conformals)))
            if task == TEST:
                drawn = [draw_frames(found, 1) for found in self._frames(task, self.main)]
                single = [object_table(frames) for frames in drawn]
                found = coverage_interval(single, conformals, resamples=self.resamples)
                rows.append(Row(self.main, f"{TEST}, frames", "coverage", *found))
        frames = [found for found in self._frames(task, self.main) if "reasons" in found]
        if frames:
            first = abstention_table(frames[0], cut_offs=self.cut_offs).set_index("reason")
            counts = tables[0]["unique_id"].size
            rows += [
                Row(self.main, task, "abstained" if reason == "any" else f"abstained: {reason}",
                    float(row["frame_rate"]), n=counts)
                for reason, row in first.iterrows() if reason != "accepted"
            ]  # fmt: skip
        return rows

    def _frames(self, task: str, method: str) -> list[pd.DataFrame]:
        """Return the frames of a method, a table a seed."""
        return [
            found
            for (of, name, _), found in self.predictions.items()
            if (of, name) == (task, method)
        ]

    def bars(self, bars: Bars) -> list[Bar]:
        """Return what must hold, met or missed, for the variants that were compared."""
        found: list[Bar] = []
        if bars.macro_f1 is not None:
            value = self._value(self.main, "macro_f1")
            found.append(Bar("macro F1 of objects, mean over seeds", value, ">=", bars.macro_f1))
        if bars.mape is not None:
            value = self._value(self.main, "mape")
            found.append(Bar("MAPE of objects, mean over seeds", value, "<=", bars.mape))
        if bars.crop_macro_f1 is not None and "crop" in self.variants:
            value = self._value("crop", "macro_f1")
            found.append(Bar("macro F1 of the crop only", value, "<=", bars.crop_macro_f1))
        if bars.coverage is not None:
            value, (low, high) = self._value(self.main, "coverage"), bars.coverage
            found.append(Bar("coverage of 90 % intervals, at least", value, ">=", low))
            found.append(Bar("coverage of 90 % intervals, at most", value, "<=", high))
        return found

    def _value(self, method: str, metric: str) -> float:
        values = [r.value for r in self.rows if r[:3] == (method, TEST, metric)]
        return values[0] if values else float("nan")
