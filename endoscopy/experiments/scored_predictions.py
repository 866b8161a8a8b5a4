"""Predictions that an evaluation scores, and what a trained network relies on, as tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.bundles.bundle_fitting import (
    CARRIED,
    frame_predictions,
    part_predictions,
    rounded_bundle,
)
from endoscopy.bundles.sizing_bundle import SizingBundle
from endoscopy.data.samples import LesionDataset
from endoscopy.data.sizing_datamodule import Part, PolypSizingDataModule
from endoscopy.evaluation.audits import (
    PLAIN,
    box_audit,
    fit_scale,
    ladder_bars,
    mask_audit,
    oracle_scale_audit,
    partition_audit,
    relative_depths,
    shortcut_audit,
    size_proxy,
    table_rows,
)
from endoscopy.evaluation.baselines import (
    REGRESSION,
    baseline_predictions,
    cue_baselines,
    ladder,
    ladder_order,
    ladder_predictions,
)
from endoscopy.evaluation.honest_table import REFERENCE
from endoscopy.evaluation.rendered_frames import FrameStack, frame_features, rendered_features
from endoscopy.evaluation.size_evaluation import TEST, SizeEvaluation, nothing
from endoscopy.experiments.sizers import (
    CONFIGURED,
    MAIN,
    RHOS,
    SHORTCUT,
    Networks,
    Sizers,
    Training,
    taking_part,
)
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table
from endoscopy.prediction import cue_frames, drop_unmasked, frames_of, predictor_of
from endoscopy.renderer.scene import RendererConfig
from endoscopy.segmenter import Segmenter
from endoscopy.training.sizing_module import SizingModule
from harness.evidence import Bar, Row


class Evaluation:
    """Predict with variants and seeds on the test part, and with the first variant under shifts.

    Args:
        sizers: The networks and their data.
        networks: Returns a trained one.
        variants: Names of variants; bars and intervals refer to the first.
        seeds: Seeds of each.
        folds: Folds whose test parts are pooled; none for the configured one.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Attributes:
        scores: What was predicted, to be scored.
    """

    def __init__(
        self,
        sizers: Sizers,
        networks: Networks,
        variants: Sequence[str],
        seeds: Sequence[int],
        folds: Sequence[int] = (),
        cut_offs: CutOffs = CONTINUOUS,
        resamples: int = 2000,
    ) -> None:
        self.sizers, self.networks = sizers, networks
        self.variants, self.seeds = tuple(variants), tuple(seeds)
        self.folds: tuple[int | None, ...] = tuple(folds) or (None,)
        self.scores = SizeEvaluation(self.main, cut_offs, resamples)

    @property
    def main(self) -> str:
        """The variant to which bars and intervals refer."""
        return self.variants[0]

    def trainings(self) -> list[Training]:
        """Return every training that is scored."""
        return [
            Training(variant, seed, fold=fold)
            for variant in self.variants
            for seed in self.seeds
            for fold in self.folds
        ]

    def run(self, shifts: Sequence[str] = (), tick: Callable[[], None] = nothing) -> None:
        """Predict everything.

        Args:
            shifts: Names of rendered sets on which the main variant predicts, too.
            tick: Called once for each set that is predicted, `ticks` times.
        """
        for training in self.trainings():
            bundle, data = self.networks(training), self.sizers.data(training)
            main = training.variant == self.main
            predictions = part_predictions(bundle, data, "test", reasons=main)
            self.scores.add(TEST, training.variant, training.seed, predictions)
            if main and len(self.folds) == 1 and bundle.conformal is not None:
                self.scores.intervals[training.seed] = bundle.conformal
            if main and training.seed == self.seeds[0]:
                train = data.load().frames.iloc[data.rows("train")]
                self.scores.add_baselines(TEST, train, predictions)
                if "synthetic" in data.sources:
                    self.scores.add_cues(cue_frames(data), predictions)
            tick()
        rendering = self.sizers.rendering
        for shift in shifts:
            assert rendering is not None
            self._predict_shift(shift, rendering.shifted(self.sizers.datamodule, shift), tick)

    def ticks(self, shifts: Sequence[str] = ()) -> int:
        """Return the number of sets to be predicted."""
        return len(self.trainings()) + len(shifts) * len(self.seeds)

    def bundles(self) -> list[SizingBundle]:
        """Return the networks of the main variant, one per seed, of the first fold."""
        return [self.networks(Training(self.main, seed, fold=self.folds[0])) for seed in self.seeds]

    def _predict_shift(self, shift: str, frames: LesionDataset, tick: Callable[[], None]) -> None:
        for seed, bundle in zip(self.seeds, self.bundles(), strict=True):
            predictions = frame_predictions(bundle, frames, np.arange(len(frames)), reasons=True)
            self.scores.add(shift, self.main, seed, predictions)
            tick()
        trained = self.sizers.data(Training(self.main, self.seeds[0], fold=self.folds[0]))
        train = trained.load().frames.iloc[trained.rows("train")]
        self.scores.add_baselines(shift, train, predictions)


KEPT = ("variant", "unique_id", "patient", "gt", "censored", "predicted_mm")

Trials = Mapping[str, Sequence[Mapping[str, float]]]


class Budget(NamedTuple):
    """What is compared, and what every variant gets.

    Attributes:
        variants: Names; the others are compared with ``plain``.
        seeds: Seeds of training objects, weights and order, at every size.
        sizes: Numbers of training objects, drawn by the seed.
        steps: Optimizer steps of every training.
        trials: Settings of each variant, equally many; none for the configured ones.
        trial_objects: Training objects of a trial.
    """

    variants: tuple[str, ...]
    seeds: Sequence[int]
    sizes: Sequence[int]
    steps: int
    trials: Trials
    trial_objects: int

    def check(self) -> None:
        """Refuse a table without a fair comparison.

        Raises:
            GatesError: A variant is unknown or ``plain`` left out, or the numbers of trials differ.
        """
        taking_part((*self.variants, *self.trials))
        if REFERENCE not in self.variants:
            raise GatesError(
                f"evaluate.variants must contain {REFERENCE!r}, with which the others are "
                f"compared; found {', '.join(self.variants)}"
            )
        counts = {name: len(self.trials.get(name, ())) for name in self.variants}
        if len(set(counts.values())) > 1:
            raise GatesError(
                f"evaluate.trials must give every variant as many trials, found {counts}"
            )


def predicted_objects(
    module: SizingModule, data: PolypSizingDataModule, part: Part
) -> pd.DataFrame:
    """Return predictions of a trained network, rounded to bfloat16, for the objects of a part."""
    return object_table(part_predictions(rounded_bundle(module, data), data, part))


def baseline_objects(data: PolypSizingDataModule) -> pd.DataFrame:
    """Return the predictions of baselines without a network for the test objects.

    A constant and the apparent area, and of rendered data the regression on area and brightness.
    """
    frames = data.load().frames
    test = frames.iloc[data.evaluation_rows("test")]
    test = test[[name for name in CARRIED if name in test]]
    predictions = baseline_predictions(frames.iloc[data.rows("train")], test)
    if "synthetic" in data.sources:
        cues = cue_baselines(*map(frame_features, cue_frames(data)))
        predictions[REGRESSION] = test.assign(predicted_mm=cues[REGRESSION])
    tables = [object_table(table).assign(variant=name) for name, table in predictions.items()]
    return pd.concat(tables, ignore_index=True)


def kept_columns(objects: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of an object table that a comparison needs, sizes in float32."""
    table = objects[[name for name in KEPT if name in objects]]
    return table.assign(predicted_mm=table["predicted_mm"].astype(np.float32))


def mean_log_error(objects: pd.DataFrame) -> float:
    """Return the mean absolute error of the logarithm of the size."""
    return float((np.log(objects["predicted_mm"]) - np.log(objects["gt"])).abs().mean())


AUDIT = "audit: "
AUDITS = ("shortcut", "masks", "boxes", "oracle_scale", "ladder")
QUESTIONS = {
    "shortcut": "trained where large lesions are seen from afar (rho 0.8), tested where they are "
    "not.",
    "partition": "test objects whose distance agrees with that habit, and those where it does not.",
    "masks": "true masks replaced by those available in practice.",
    "boxes": "boxes that are wrong by a fifth.",
    "oracle_scale": "relative depth with its scale handed in, for a network trained on metric "
    "depth.",
    "ladder": "regressions on hand-made cues.",
}
"""What an audit asks, by the name of its table."""

OF_TRUTH = {
    "masks": {"mask_path": "a mask"},
    "oracle_scale": {"mask_path": "a mask", "depth_path": "a depth"},
}
"""Columns of the frame table that audits need, and what they contain."""

SHOWN = {
    *("macro_f1", "macro_f1_change", "mape", "mape_change", *PLAIN, "holds"),
    *("ranking_auc", "open_rest", "r2", "accuracy"),
}
"""Scores that are printed; all are in the file."""

TRAINED_RHO, TESTED_RHOS = 0.8, (0.8, 0.0, -0.8)

Cues = Callable[[RendererConfig, range], dict[str, pd.DataFrame]]


class Audit:
    """Audit the configured network of one seed on its test objects.

    Args:
        sizers: The networks and their data.
        networks: Returns a trained one.
        segmenter: Predicts masks instead of the true ones; None leaves them out.
        test_objects: Objects of the audits of masks, boxes and scale.
        ladder_objects: Training and test objects of the ladder.
        seed: Of the audited network, and of those that audits train.
        cues: Renders objects and returns their cues by exposure, for the ladder.
        resamples: Number of bootstrap resamples.

    Attributes:
        tables: What was found, by audit.
        notes: What a reader must know.
    """

    def __init__(
        self,
        sizers: Sizers,
        networks: Networks,
        segmenter: Segmenter | None = None,
        test_objects: int = 300,
        ladder_objects: tuple[int, int] = (700, 3000),
        seed: int = 0,
        cues: Cues = rendered_features,
        resamples: int = 2000,
    ) -> None:
        self.sizers, self.networks, self.segmenter = sizers, networks, segmenter
        self.test_objects, self.ladder_objects = test_objects, ladder_objects
        self.seed, self.cues, self.resamples = seed, cues, resamples
        self.cut_offs: CutOffs = sizers.module.cut_offs
        self.tables: dict[str, pd.DataFrame] = {}
        self.notes: list[str] = []
        self._frames: FrameStack | None = None

    def obstacle(self, name: str) -> str:
        """Return which data an audit lacks, with a remedy; empty if it can run."""
        data = self.sizers.datamodule
        if "synthetic" in data.sources:
            return ""
        if name in ("shortcut", "ladder"):
            return "needs rendered frames: use the configuration synthetic"
        frames = data.load().frames
        for column, what in OF_TRUTH.get(name, {}).items():
            if column not in frames or (frames[column].fillna("") == "").any():
                return f"needs {what} of every frame: fill {column}, or take rendered frames"
        return ""

    def run(self, names: Sequence[str], tick: Callable[[], None] = nothing) -> None:
        """Run audits.

        Args:
            names: Some of ``AUDITS``.
            tick: Called after each.
        """
        audits: dict[str, Callable[[], None]] = {
            "shortcut": self._shortcut,
            "masks": self._masks,
            "boxes": self._boxes,
            "oracle_scale": self._oracle_scale,
            "ladder": self._ladder,
        }
        for name in names:
            audits[name]()
            tick()

    def needs(self, names: Sequence[str]) -> list[Training]:
        """Return the training runs that audits examine."""
        variants = {
            "shortcut": (CONFIGURED, "shortcut"),
            "masks": (CONFIGURED,),
            "boxes": (CONFIGURED,),
            "oracle_scale": (CONFIGURED, "depth"),
        }
        wanted = (variant for name in names for variant in variants.get(name, ()))
        return [Training(variant, self.seed) for variant in dict.fromkeys(wanted)]

    @property
    def _options(self) -> dict[str, Any]:
        return {"cut_offs": self.cut_offs, "resamples": self.resamples}

    def _test_frames(self) -> FrameStack:
        """Return frames of the first test objects, with masks and depths, read once."""
        if self._frames is None:
            source, rows = self._source(), self.sizers.datamodule.evaluation_rows("test")
            objects = source.reader.table.object_codes[rows]
            chosen = np.isin(objects, np.unique(objects)[: self.test_objects])
            self._frames, empty = drop_unmasked(frames_of(source, rows[chosen]))
            if empty:
                self.notes.append(f"{empty} frames without a visible mask are left out")
        return self._frames

    def _source(self) -> LesionDataset:
        """Return all rows with what audits need, whatever the network reads."""
        return self.sizers.datamodule.variant(streams=("rgb_mask_depth",)).frames()

    def _predicted_masks(self, frames: FrameStack) -> dict[str, np.ndarray]:
        if self.segmenter is None:
            return {}
        masks = [self.segmenter.probability(image) > 0.5 for image in frames.images]
        return {"segmenter": np.stack(masks)}

    def _shortcut(self) -> None:
        predict = predictor_of(self.networks(Training("shortcut", self.seed)))
        rendering, data, tests = self.sizers.rendering, self.sizers.datamodule, {}
        assert rendering is not None
        for rho in TESTED_RHOS:
            source = rendering.shifted(data, f"rho {rho:g}")
            tests[rho], _ = drop_unmasked(frames_of(source, np.arange(len(source))))
        self.tables["shortcut"] = shortcut_audit(
            predict, tests, trained_rho=TRAINED_RHO, **self._options
        )
        predictions = part_predictions(self.networks(Training(seed=self.seed)), data, "test")
        if "distance_mm" in predictions and predictions["distance_mm"].notna().all():
            self.tables["partition"] = partition_audit(predictions, **self._options)

    def _masks(self) -> None:
        frames = self._test_frames()
        predict = predictor_of(self.networks(Training(seed=self.seed)))
        self.tables["masks"] = mask_audit(
            predict, frames, predicted=self._predicted_masks(frames), **self._options
        )

    def _boxes(self) -> None:
        predict = predictor_of(self.networks(Training(seed=self.seed)))
        self.tables["boxes"] = box_audit(predict, self._test_frames(), **self._options)

    def _oracle_scale(self) -> None:
        """The network was trained on metric depth; scales are in units of its size proxy."""
        data = self.sizers.datamodule
        train, _ = drop_unmasked(frames_of(self._source(), data.evaluation_rows("train")))
        test = self._test_frames()
        if train.depths is None or test.depths is None:
            raise GatesError("the data has no depths: render them, or leave this audit out")
        metric = fit_scale(size_proxy(train.masks, train.depths), train.gt)
        scale = fit_scale(size_proxy(train.masks, relative_depths(train.depths)), train.gt)
        self.tables["oracle_scale"] = oracle_scale_audit(
            predictor_of(self.networks(Training("depth", self.seed)), depth_factor=1 / metric),
            test,
            relative_depths(test.depths),
            global_scale=scale,
            masks=self._predicted_masks(test),
            **self._options,
        )

    def _ladder(self) -> None:
        rendering, count = self.sizers.rendering, self.ladder_objects[0]
        assert rendering is not None
        main = rendering.set(self.sizers.datamodule, MAIN).config
        config = replace(main, seed=main.seed + 10)  # other objects
        train = self.cues(config, range(count))
        test = self.cues(config, range(count, sum(self.ladder_objects)))
        self.tables["ladder"] = ladder(train, test, **self._options)
        self.tables["ladder_order"] = ladder_order(ladder_predictions(train, test), **self._options)

    def rows(self) -> list[Row]:
        """Return the scores of all tables."""
        return [
            row
            for name, table in self.tables.items()
            for row in table_rows(name, table, task=f"{AUDIT}{name}")
        ]

    def bars(self) -> list[Bar]:
        """Return how far the ladder is from the published one, except for the constant."""
        if "ladder" not in self.tables:
            return []
        return ladder_bars(self.tables["ladder"], self.tables["ladder_order"], prefix=AUDIT)


def sets_of(names: Sequence[str]) -> tuple[str, ...]:
    """Return the rendered sets that audits need."""
    return (MAIN, *RHOS, SHORTCUT) if "shortcut" in names else (MAIN,)
