"""Training, validation, calibration and test frames for polyp sizing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least, check_option
from endoscopy.data.frame_cache import FrameCache, FrameReader, StoreForm
from endoscopy.data.frame_table import FrameTable, concatenate, object_keys
from endoscopy.data.images import Augmentation, train_pipeline
from endoscopy.data.object_splits import (
    Folds,
    Level,
    Split,
    audit5,
    draw_objects,
    make_folds,
    official_hag6,
    read_folds,
    split_by_counts,
)
from endoscopy.data.readers.real_colon import DOWNLOAD, read_real_colon
from endoscopy.data.readers.sun import read_sun
from endoscopy.data.readers.tabular import ReadReport, read_frame_table
from endoscopy.data.samples import (
    BatchDataset,
    BatchOrder,
    EpochSampler,
    FrameLoader,
    LesionDataset,
    ObjectBalancedSampler,
    WeightedFrameSampler,
)
from endoscopy.data.streams import NEEDS_DEPTH, WITH_MASK, InputForm, Outline, check_streams
from endoscopy.metrics.classification import TRUTH
from harness.files import Data

Part = Literal["train", "validation", "test", "calibration"]
SplitKind = Literal["audit5", "hag6", "made", "file", "counts"]
SamplerKind = Literal["object", "class", "effective"]
CHOICES = {
    "level": Level,
    "sampler": SamplerKind,
    "augmentation": Augmentation,
    "cache_form": StoreForm,
}
REAL = ("real_colon", "sun")  # folders of up to millions of files
AT_LEAST_ONE = ("size", "batch_size", "frames_per_object", "eval_frames_per_object", "cache_epochs")


class PolypSizingDataModule(L.LightningDataModule):
    """Frames of lesions with their sizes, for ``endoscopy.training.sizing_module.SizingModule``.

    Name one source or several, which are joined. Evaluation parts take the first frames of every
    object, in order. A batch is what `endoscopy.data.samples.collate` returns.

    Args:
        table: Parquet file, CSV file or folder of CSV parts, see
            `endoscopy.data.readers.tabular.read_frame_table`.
        real_colon: Folder in the layout of REAL-Colon.
        sun: Folder in the layout of SUN.
        synthetic: Folder of rendered data.
        split: ``audit5`` and ``hag6`` are published, ``made`` draws new folds, ``file`` reads your
            folds, ``counts`` draws objects at random.
        fold: Test fold; the next one is for validation.
        split_file: CSV file of the official split or of your folds.
        num_folds: Number of folds where they are ``made``.
        level: What ``made`` folds keep together.
        split_seed: Seed of a split that is ``made`` or drawn by ``counts``.
        train_objects: Objects to train on, where split is ``counts``.
        validation_objects: Objects to validate on, where split is ``counts``.
        calibration_objects: Objects to calibrate intervals on, where split is ``counts``.
        test_objects: Objects to test on, where split is ``counts``.
        streams: Inputs of the network, see `endoscopy.data.streams.STREAMS`.
        size: Side length in pixels.
        aperture: Radius of a round aperture, in half sides; none by default.
        batch_size: Frames per step over all ranks.
        sampler: ``object`` draws equally many frames of each object, ``class`` and ``effective``
            draw by weights.
        frames_per_object: Frames drawn from each object in a training epoch.
        eval_frames_per_object: Maximum number of frames per object in the other parts.
        augmentation: Augmentation of `endoscopy.data.images.train_pipeline`.
        cache_folder: Parent of the cache of decoded frames; none by default.
        cache_form: How the cache stores a frame: ``raw`` or as ``jpeg``.
        cache_epochs: Epochs whose training frames the cache holds; others are decoded.
        num_workers: Processes that read frames; with 0 the training process reads them.
        seed: Seed of order and augmentation.

    Attributes:
        frame_table: All frames, after `load`.
        report: What readers excluded and repaired.
        folds: The folds; None for ``counts``.
        parts: Rows of each part.
        announce: Called with the size of a cache before `prepare_data` builds it; the
            command line prints it.

    Raises:
        ValueError: No source is named, a number is not positive, or an option has no such value.
        GatesError: A stream is unknown.
    """

    def __init__(
        self,
        table: str | None = None,
        real_colon: str | None = None,
        sun: str | None = None,
        synthetic: str | None = None,
        split: SplitKind = "audit5",
        fold: int = 0,
        split_file: str | None = None,
        num_folds: int = 5,
        level: Level = "patient",
        split_seed: int = 1,
        train_objects: int = 150,
        validation_objects: int = 100,
        calibration_objects: int = 0,
        test_objects: int = 1000,
        streams: Sequence[str] = ("rgb",),
        size: int = 384,
        aperture: float | None = None,
        batch_size: int = 32,
        sampler: SamplerKind = "object",
        frames_per_object: int = 40,
        eval_frames_per_object: int = 300,
        augmentation: Augmentation = "published",
        cache_folder: str | None = None,
        cache_form: StoreForm = "raw",
        cache_epochs: int = 40,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sources = {"table": table, "real_colon": real_colon, "sun": sun, "synthetic": synthetic}
        self.sources = {name: path for name, path in sources.items() if path is not None}
        if not self.sources:
            raise ValueError(f"no source is named: give one of {', '.join(sources)}")
        self.streams = check_streams(streams, has_depth=True)
        self.split_kind, self.fold, self.split_file = split, fold, split_file
        self.num_folds, self.level, self.split_seed = num_folds, level, split_seed
        self.counts = (train_objects, validation_objects, test_objects, calibration_objects)
        self.size, self.aperture, self.batch_size = size, aperture, batch_size
        self.sampler, self.augmentation = sampler, augmentation
        self.frames_per_object = frames_per_object
        self.eval_frames_per_object = eval_frames_per_object
        self.cache_folder, self.cache_form = cache_folder, cache_form
        self.cache_epochs, self.num_workers, self.seed = cache_epochs, num_workers, seed
        self.frame_table: FrameTable | None = None
        self.report = ReadReport("")
        self.folds: Folds | None = None
        self.parts: Split | None = None
        self.cache: FrameCache | None = None
        self.announce: Callable[[str], object] | None = None
        self._tables: dict[str, FrameTable] = {}
        self._digests: dict[str, Data] = {}  # by path; shared with copies
        self._check_options()

    def _check_options(self) -> None:
        check_at_least(1, **{name: getattr(self, name) for name in AT_LEAST_ONE})
        check_option("split", self.split_kind, get_args(SplitKind))
        for name, kind in CHOICES.items():
            check_option(name, getattr(self, name), get_args(kind))
        if self.split_kind in ("hag6", "file") and self.split_file is None:
            raise ValueError(f"split {self.split_kind} needs split_file, the CSV with the folds")

    def check_sources(self) -> None:
        """Check that the sources exist, before anything is rendered to be joined to them.

        Raises:
            GatesError: One is absent. Rendered data may be.
        """
        given = {n: p for n, p in self.sources.items() if n != "synthetic"}
        if self.split_file is not None:
            given["split_file"] = self.split_file
        for name, path in given.items():
            if not Path(path).exists():
                what = "FOLDER" if name in REAL else "FILE"
                get = DOWNLOAD if name == "real_colon" else ""
                raise GatesError(
                    f"data.{name}: {path} does not exist: name another one with --data.{name} "
                    f"{what}{get}"
                )

    def load(self) -> FrameTable:
        """Read and split the table, once; nothing is decoded.

        Raises:
            GatesError: A source is absent or cannot be read, or the split cannot be made; the
                message then lists what was left out before.
        """
        if self.frame_table is not None:
            return self.frame_table
        self.check_sources()
        read: dict[str, Callable[[str], tuple[FrameTable, ReadReport]]] = {
            "table": read_frame_table,
            "real_colon": read_real_colon,
            "sun": read_sun,
            "synthetic": read_real_colon,
        }
        self._tables = {}
        for name, path in self.sources.items():
            if name == "synthetic" and not Path(path).exists():
                raise GatesError(f"{path} does not exist: run `gates endoscopy render` first")
            self._tables[name], report = read[name](path)
            self.report.merge(report)
        tables = list(self._tables.values())
        joined = concatenate(tables) if len(tables) > 1 else tables[0]
        try:
            self.parts = self._split(joined)
        except GatesError as error:
            count, why = self.report.total("excluded"), ", ".join(self.report.reasons("excluded"))
            before = f" (before, {count} of {self.report.found} rows were left out: {why})"
            raise GatesError(f"{error}{before if count else ''}") from error
        self.frame_table = joined
        return joined

    def variant(
        self,
        *,
        seed: int | None = None,
        streams: Sequence[str] | None = None,
        fold: int | None = None,
        train_objects: int | None = None,
    ) -> PolypSizingDataModule:
        """Return a variant of these data; table and cache are shared.

        Another fold has its own cache, and so have masks or depths that this one lacks.

        Args:
            seed: Of order and augmentation, and of the draw of training objects.
            streams: Inputs of the network.
            fold: Test fold.
            train_objects: Objects drawn from the training part; all of it by default.

        Raises:
            GatesError: The training part has fewer objects.
        """
        table = self.load()
        other = copy.copy(self)
        other.trainer = None
        other.report = ReadReport("")
        other.seed = self.seed if seed is None else seed
        if streams is not None:
            other.streams = check_streams(streams, has_depth=True)
        other.cache = self.plan_cache()
        reader = other._reader()
        if other.cache and (reader.masks, reader.depths) > (other.cache.masks, other.cache.depths):
            other.cache = None  # it makes its own
        if fold is not None and fold != self.fold:
            other.fold, other.cache = fold, None
            other.parts = other._split(table)
        if train_objects is not None and other.parts is not None:
            rows = draw_objects(table, other.parts.train, train_objects, other.seed)
            other.parts = other.parts._replace(train=rows)
        return other

    def elsewhere(self, synthetic: str, train_objects: int) -> PolypSizingDataModule:
        """Return the same data from another rendered folder, for training only.

        Args:
            synthetic: Folder of rendered data with two more objects than are trained on.
            train_objects: Of the training part; one object validates and one tests.
        """
        other = copy.copy(self)
        other.trainer, other.cache, other.frame_table, other.parts = None, None, None, None
        other.report, other.folds = ReadReport(""), None
        other.sources, other.split_kind = {"synthetic": synthetic}, "counts"
        other.counts = (train_objects, 1, 1, 0)
        return other

    def plan_cache(self) -> FrameCache | None:
        """Return the planned cache, whose size is known before it is built; None without one."""
        if self.cache_folder is None:
            return None
        self.load()
        if self.cache is None:
            others: tuple[Part, ...] = ("validation", "test", "calibration")
            rows = [
                self._sampler("train", 0, 1).drawable(self.cache_epochs),
                *(self.evaluation_rows(part) for part in others if len(self.rows(part))),
            ]
            self.cache = FrameCache(
                self._reader(), np.concatenate(rows), self.cache_folder, self.cache_form
            )
        return self.cache

    def prepare_data(self) -> None:
        """Announce and build the cache, on one process only."""
        cache = self.plan_cache()
        if cache is None:
            return
        if self.announce is not None and not cache.is_complete():
            self.announce(cache.summary())
        cache.build()

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Read the table and leave out frames that the cache found unreadable."""
        self.load()
        cache = self.plan_cache()
        if cache is None or not cache.is_complete():
            return
        bad = cache.unreadable_rows()
        if len(bad) and self.parts is not None:
            self.parts = Split(*(np.setdiff1d(rows, bad) for rows in self.parts))
            report = cache.build()
            if report.unreadable and not set(report.unreadable) <= set(self.report.unreadable):
                self.report.merge(report)

    def state_dict(self) -> dict[str, Any]:
        """Return the keys of the training objects, so that a checkpoint states what it has seen."""
        return {"trained_on": self.training_objects()}

    def training_objects(self) -> list[str]:
        """Return short hashes of the training objects."""
        return self.object_keys("train")

    def object_keys(self, part: Part) -> list[str]:
        """Return short hashes of the objects of a part."""
        return object_keys(self.load().frames.iloc[self.rows(part)])

    def digest(self) -> list[Data]:
        """Describe the existing sources, and the file of the split, once per process.

        Files and small folders are hashed as a whole. For real data, which may be millions of
        files, the table of frames is hashed instead: names, boxes and sizes.

        Raises:
            GatesError: Real data cannot be read.
        """
        paths = self.sources | ({} if self.split_file is None else {"split_file": self.split_file})
        for name, path in paths.items():
            if path in self._digests or not Path(path).exists():
                continue
            if name in REAL:
                self.load()
                table = self._tables[name]
                self._digests[path] = Data(
                    name, "frames", table.digest(), len(table), "rows", listing=True
                )
            else:
                self._digests[path] = Data.of(name, "frames", Path(path))
        return [self._digests[path] for path in paths.values() if path in self._digests]

    def rows(self, part: Part) -> NDArray[np.int64]:
        """Return the rows (N,) of a part, ascending.

        Raises:
            GatesError: The data is not loaded.
            ValueError: There is no such part.
        """
        if self.parts is None:
            raise GatesError("the data is not loaded; call setup first")
        check_option("part", part, get_args(Part))
        return getattr(self.parts, part)

    def evaluation_rows(self, part: Part) -> NDArray[np.int64]:
        """Return the rows of a part that are evaluated: the first of every object, in order.

        Raises:
            GatesError: The part is empty.
        """
        if part != "train":
            return self._sampler(part, 0, 1).draw(0)
        codes, most = self.load().object_codes, self.eval_frames_per_object
        return ObjectBalancedSampler(codes, most, rows=self.rows(part), frozen=True).draw(0)

    @property
    def form(self) -> InputForm:
        """Streams, size, aperture and outline of the input, the last by the training masks."""
        outline: Outline = "box"
        frames = self.load().frames
        if "mask_path" in frames and WITH_MASK & set(self.streams):
            has_mask = frames["mask_path"].iloc[self.rows("train")].fillna("") != ""
            outline = "mask" if has_mask.all() else "either" if has_mask.any() else "box"
        return InputForm(self.streams, self.size, self.aperture, outline)

    def frames(self) -> LesionDataset:
        """Return the lesions of all rows, not augmented."""
        return LesionDataset(self._reader(), None, self.cache, self.seed)

    def loader(self, part: Part) -> FrameLoader:
        """Return the frames of a part: shuffled and augmented for training, in order otherwise."""
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        trains = part == "train"
        if self.batch_size % world:
            raise GatesError(
                f"batch_size {self.batch_size} cannot be shared evenly by {world} processes; "
                f"choose a multiple of {world}"
            )
        pipeline = train_pipeline(self.size, self.augmentation) if trains else None
        frames = LesionDataset(self._reader(), pipeline, self.cache, self.seed)
        order = BatchOrder(
            self._sampler(part, rank, world), self.batch_size // world, even=not trains
        )
        return FrameLoader.over(BatchDataset(frames, self.form), order, self.num_workers)

    def train_dataloader(self) -> FrameLoader:
        """Return the training frames of this rank."""
        return self.loader("train")

    def val_dataloader(self) -> FrameLoader:
        """Return the validation frames of this rank."""
        return self.loader("validation")

    def test_dataloader(self) -> FrameLoader:
        """Return the test frames of this rank."""
        return self.loader("test")

    def predict_dataloader(self) -> FrameLoader:
        """Return the test frames of this rank."""
        return self.loader("test")

    def _split(self, table: FrameTable) -> Split:
        if self.split_kind == "counts":
            return split_by_counts(table, *self.counts, seed=self.split_seed)
        match self.split_kind:
            case "audit5":
                folds = audit5(table)
            case "hag6":
                folds = official_hag6(str(self.split_file))
            case "file":
                folds = read_folds(str(self.split_file), self.level)
            case _:
                folds = make_folds(table, self.num_folds, self.level, self.split_seed)
        self.folds = folds
        if missing := folds.unassigned(table):
            self.report.add("noted", f"object is in no fold of {folds.name}", missing)
        self.report.notes += [f"{folds.name}: {note}" for note in folds.notes]
        return folds.split(table, self.fold)

    def _reader(self) -> FrameReader:
        return FrameReader(
            self.load(),
            self.size,
            masks=bool(WITH_MASK & set(self.streams)),
            depths=bool(NEEDS_DEPTH & set(self.streams)),
        )

    def _sampler(self, part: Part, rank: int, world: int) -> EpochSampler:
        table, rows = self.load(), self.rows(part)
        if len(rows) == 0:
            raise GatesError(f"the {part} part is empty; give it objects")
        balanced = ObjectBalancedSampler(
            table.object_codes,
            self.frames_per_object if part == "train" else self.eval_frames_per_object,
            rows=rows,
            seed=self.seed,
            frozen=part != "train",
            num_replicas=world,
            rank=rank,
            even=part == "train",
        )
        if part != "train" or self.sampler == "object":
            return balanced
        return WeightedFrameSampler(
            table.object_codes,
            TRUTH.classes(table.frames["gt"]),
            balanced.num_rows,
            balance=self.sampler,
            rows=rows,
            seed=self.seed,
            num_replicas=world,
            rank=rank,
            even=True,
        )
