"""What a trained network leans on: audits and the ladder, and studies of gates, as tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from apps.endoscopy.ladder import ladder_features
from apps.endoscopy.rendering import MAIN, RHOS, SHORTCUT, Rendering
from apps.endoscopy.scores import AUDIT, write_part
from apps.endoscopy.scoring import render_missing
from apps.endoscopy.training import Sizers, Training
from core_gates.errors import GatesError
from endoscopy.bundles.building import part_predictions
from endoscopy.data.frames.dataset import LesionDataset
from endoscopy.evaluation.audits import (
    box_audit,
    fit_scale,
    mask_audit,
    oracle_scale_audit,
    partition_audit,
    shortcut_audit,
    size_proxy,
)
from endoscopy.evaluation.audits.oracle_scale import relative_depths
from endoscopy.evaluation.audits.rows import PLAIN, ladder_bars, table_rows
from endoscopy.evaluation.frames import FrameStack
from endoscopy.evaluation.ladder import ladder, ladder_order, ladder_predictions
from endoscopy.inference.in_memory import frames_of, predictor_of, without_mask
from endoscopy.metrics import CONTINUOUS, CutOffs
from endoscopy.segmentation.segmenter import Segmenter
from endoscopy.training.variants import CONFIGURED
from harness.evidence.rows import Bar, Row
from harness.experiment.printing import print_scores
from harness.experiment.scores import read_scores
from harness.files.atomic import write_bytes
from harness.runs.ticker import ticking
from studies import (
    Budget,
    generalization_study,
    generalization_table,
    planted_features_headline,
    planted_features_study,
    planted_features_table,
)
from studies.generalization import VARIANTS
from studies.image_sets import LabeledImages, digits, fashion_mnist

Study = Literal[
    "audits", "shortcut", "masks", "boxes", "oracle_scale", "ladder", "planted", "generalization"
]
AUDITS = ("shortcut", "masks", "boxes", "oracle_scale", "ladder")
OF_TRUTH = {
    "masks": {"mask_path": "a mask"},
    "oracle_scale": {"mask_path": "a mask", "depth_path": "a depth"},
}
"""Columns of the frame table that audits need, and what they name."""

FOLDER = "audits"
TRAINED_RHO, TESTED_RHOS = 0.8, (0.8, 0.0, -0.8)
FASHION_IMAGES = 6000


class Audit:
    """Audit the configured network of one seed on its test objects.

    Every table is kept as ``audits/<name>.parquet`` in the run folder, where the report finds it.

    Args:
        sizers: Trained networks and their data.
        rendering: Where rendered sets are.
        segmenter: Makes the masks that stand in for true ones; None leaves them out.
        test_objects: Objects of the audits of masks, boxes and scale.
        ladder_objects: Training and test objects of the ladder.
        cut_offs: Of the predictions.
        seed: Of the audited network, and of those that audits train.
        images: Of the study of generalization: ``digits``, ``fashion_mnist`` where its Debian
            package puts it, or a folder with its files.
        resamples: Draws of the bootstrap.
    """

    def __init__(
        self,
        sizers: Sizers,
        rendering: Rendering,
        segmenter: Segmenter | None = None,
        test_objects: int = 300,
        ladder_objects: tuple[int, int] = (700, 3000),
        cut_offs: CutOffs = CONTINUOUS,
        seed: int = 0,
        images: str = "digits",
        resamples: int = 2000,
    ) -> None:
        self.images = images
        self.sizers, self.rendering, self.segmenter = sizers, rendering, segmenter
        self.test_objects, self.ladder_objects = test_objects, ladder_objects
        self.cut_offs, self.seed, self.resamples = cut_offs, seed, resamples
        self.tables: dict[str, pd.DataFrame] = {}
        self.notes: list[str] = []
        self._frames: FrameStack | None = None

    @property
    def folder(self) -> Path:
        """Where tables are kept."""
        return self.sizers.run_folder.path / FOLDER

    def supported(self, study: Study) -> tuple[str, ...]:
        """Return the audits or studies to run; say which ones the data cannot support, and why.

        Raises:
            GatesError: None can be run.
        """
        names = AUDITS if study == "audits" else (study,)
        obstacles = {name: self._obstacle(name) for name in names}
        for name, why in obstacles.items():
            if why and study != "audits":
                raise GatesError(f"--study {name} {why}")
            if why:
                print(f"{name} left out: it {why}", flush=True)
        return tuple(name for name, why in obstacles.items() if not why)

    def _obstacle(self, name: str) -> str:
        """Return what a study needs and the data lack, and what to do; empty if nothing."""
        data = self.sizers.datamodule
        if "synthetic" in data.sources:
            return ""
        if name in ("shortcut", "ladder"):
            return "needs rendered frames: take the configuration synthetic"
        frames = data.load().frames
        for column, what in OF_TRUTH.get(name, {}).items():
            if column not in frames or (frames[column].fillna("") == "").any():
                return f"needs {what} of every frame: fill {column}, or take rendered frames"
        return ""

    def run(self, names: Sequence[str]) -> None:
        """Run audits or studies."""
        with ticking("auditing", len(names)) as tick:
            for name in names:
                audits: dict[str, Callable[[], None]] = {
                    "shortcut": self._shortcut,
                    "masks": self._masks,
                    "boxes": self._boxes,
                    "oracle_scale": self._oracle_scale,
                    "ladder": self._ladder,
                    "planted": self._planted,
                    "generalization": self._generalization,
                }
                audits[name]()
                tick()

    def needs(self, names: Sequence[str]) -> list[Training]:
        """Return the trainings that audits or studies are about."""
        variants = {
            "shortcut": (CONFIGURED, "shortcut"),
            "masks": (CONFIGURED,),
            "boxes": (CONFIGURED,),
            "oracle_scale": (CONFIGURED, "depth"),
        }
        wanted = dict.fromkeys(v for name in names for v in variants.get(name, ()))
        return [Training(variant, self.seed) for variant in wanted]

    def _keep(self, name: str, table: pd.DataFrame) -> None:
        self.tables[name] = table
        write_bytes(self.folder / f"{name}.parquet", table.to_parquet(None, index=False))

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
        predict = predictor_of(self.sizers.load(Training("shortcut", self.seed)))
        tests = {}
        for rho in TESTED_RHOS:
            source = self.rendering.shifted(self.sizers.datamodule, f"rho {rho:g}")
            tests[rho], _ = without_mask(frames_of(source, np.arange(len(source))))
        options: dict[str, Any] = {"cut_offs": self.cut_offs, "resamples": self.resamples}
        self._keep("shortcut", shortcut_audit(predict, tests, trained_rho=TRAINED_RHO, **options))
        bundle, data = self.sizers.load(Training(seed=self.seed)), self.sizers.datamodule
        found = part_predictions(bundle, data, "test")
        if "distance_mm" in found and found["distance_mm"].notna().all():
            self._keep("partition", partition_audit(found, **options))

    def _masks(self) -> None:
        frames = self._test_frames()
        predict = predictor_of(self.sizers.load(Training(seed=self.seed)))
        table = mask_audit(
            predict,
            frames,
            predicted=self._predicted_masks(frames),
            cut_offs=self.cut_offs,
            resamples=self.resamples,
        )
        self._keep("masks", table)

    def _boxes(self) -> None:
        predict = predictor_of(self.sizers.load(Training(seed=self.seed)))
        table = box_audit(
            predict, self._test_frames(), cut_offs=self.cut_offs, resamples=self.resamples
        )
        self._keep("boxes", table)

    def _oracle_scale(self) -> None:
        """The network has learned on metric depth; a scale is one in units of its size proxy."""
        data = self.sizers.datamodule
        train, _ = without_mask(frames_of(self._source(), data.evaluation_rows("train")))
        test = self._test_frames()
        if train.depths is None or test.depths is None:
            raise GatesError("the data has no depths: render them, or leave this audit out")
        metric = fit_scale(size_proxy(train.masks, train.depths), train.gt)
        scale = fit_scale(size_proxy(train.masks, relative_depths(train.depths)), train.gt)
        bundle = self.sizers.load(Training("depth", self.seed))
        table = oracle_scale_audit(
            predictor_of(bundle, depth_factor=1 / metric),
            test,
            relative_depths(test.depths),
            global_scale=scale,
            masks=self._predicted_masks(test),
            cut_offs=self.cut_offs,
            resamples=self.resamples,
        )
        self._keep("oracle_scale", table)

    def _ladder(self) -> None:
        train, test = ladder_features(self.rendering, self.sizers, self.ladder_objects, self.folder)
        options: dict[str, Any] = {"cut_offs": self.cut_offs, "resamples": self.resamples}
        self._keep("ladder", ladder(train, test, **options))
        self._keep("ladder_order", ladder_order(ladder_predictions(train, test), **options))

    def _planted(self) -> None:
        table = planted_features_table(planted_features_study())
        self.notes.append(planted_features_headline(table))
        self._keep("planted", table)

    def _generalization(self) -> None:
        data = self._images()
        budget = Budget(num_train=FASHION_IMAGES) if len(data.train[0]) > FASHION_IMAGES else None
        seeds = range(5)
        with ticking(f"training on {self._data_set}", len(seeds) * len(VARIANTS)) as tick:
            found = generalization_study(data, seeds=seeds, budget=budget, tick=tick)
        table = generalization_table(found)
        self._keep(f"generalization_{self._data_set}", table)

    @property
    def _data_set(self) -> str:
        """``digits``, ``fashion_mnist``, or the name of the folder, in letters for a file."""
        return re.sub(r"\W+", "_", Path(self.images).absolute().name)

    def _images(self) -> LabeledImages:
        if self.images == "digits":
            return digits()
        return fashion_mnist() if self.images == "fashion_mnist" else fashion_mnist(self.images)

    def rows(self) -> list[Row]:
        """Return the figures of all tables."""
        return [
            row
            for name, table in self.tables.items()
            for row in table_rows(name, table, task=f"{AUDIT}{name}")
        ]

    def bars(self) -> list[Bar]:
        """Return how far the ladder is from the published one, the constant row excepted."""
        if "ladder" not in self.tables:
            return []
        return ladder_bars(self.tables["ladder"], self.tables["ladder_order"], prefix=AUDIT)


SHOWN = {
    *("macro_f1", "macro_f1_change", "mape", "mape_change", *PLAIN, "holds"),
    *("ranking_auc", "gain", "open_rest", "r2", "accuracy", "accuracy_difference"),
}
"""Figures that are printed; all are in the scores."""


def write_audit(audit: Audit, study: Study, config_path: Path | None) -> Path:
    """Render and train what a study needs, run it, and add its figures to the scores."""
    sizers, names = audit.sizers, audit.supported(study)
    needs = audit.needs(names)
    missing = sizers.missing(needs)
    if missing:
        print(f"weights missing: {sizers.reasons(missing)}; training them now")
    if needs:
        sets = (MAIN, *RHOS, SHORTCUT) if "shortcut" in names else (MAIN,)
        render_missing(sizers.datamodule, audit.rendering, sets)
        sizers.datamodule.setup("test")
        sizers.train_missing(needs)
    audit.run(names)
    rows = audit.rows()
    path = write_part(
        sizers.run_folder.scores,
        audit=True,
        config_path=config_path,
        seeds=[audit.seed],
        rows=rows,
        bars=audit.bars(),
    )
    for note in audit.notes:
        print(note)
    tasks = AUDIT if study == "audits" else f"{AUDIT}{study}"
    print_scores(path, read_scores(path, "endoscopy"), metrics=SHOWN, tasks=tasks)
    return path
