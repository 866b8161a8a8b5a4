"""What a trained network relies on: audits and the ladder, as tables."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.bundles.bundle_fitting import part_predictions
from endoscopy.data.samples import LesionDataset
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
from endoscopy.evaluation.baselines import ladder, ladder_order, ladder_predictions
from endoscopy.evaluation.rendered_frames import FrameStack, rendered_features
from endoscopy.evaluation.size_evaluation import nothing
from endoscopy.experiments.sizers import (
    CONFIGURED,
    MAIN,
    RHOS,
    SHORTCUT,
    Networks,
    Sizers,
    Training,
)
from endoscopy.metrics import CutOffs
from endoscopy.prediction import frames_of, predictor_of, without_mask
from endoscopy.renderer.scene import RendererConfig
from endoscopy.segmenter import Segmenter
from harness.evidence import Bar, Row

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
        """Return what an audit needs and the data lack, with a remedy; empty if nothing."""
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
            self._frames, empty = without_mask(frames_of(source, rows[chosen]))
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
            tests[rho], _ = without_mask(frames_of(source, np.arange(len(source))))
        self.tables["shortcut"] = shortcut_audit(
            predict, tests, trained_rho=TRAINED_RHO, **self._options
        )
        found = part_predictions(self.networks(Training(seed=self.seed)), data, "test")
        if "distance_mm" in found and found["distance_mm"].notna().all():
            self.tables["partition"] = partition_audit(found, **self._options)

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
        train, _ = without_mask(frames_of(self._source(), data.evaluation_rows("train")))
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
