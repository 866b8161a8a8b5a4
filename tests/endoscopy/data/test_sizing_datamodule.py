import shutil
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from core_gates.errors import GatesError
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from harness.files import Data

OBJECTS = 14


@pytest.fixture(scope="module")
def rendered(real_colon, tmp_path_factory):
    """Rendered data in the official layout: one object a video, six frames, targets."""
    root = tmp_path_factory.mktemp("data") / "rendered"
    root.mkdir()
    lesions = {f"{k:03d}-001_1": (f"{2 + k}", "", "") for k in range(OBJECTS)}
    real_colon.write_csv(root / "lesion_info.csv", real_colon.lesion_rows(lesions))
    (root / "manifest.json").write_text('{"scope": "synthetic"}')
    for name in lesions:
        video = name.partition("_")[0]
        for frame in range(6):
            boxes = {name: real_colon.box(name, frame)}
            real_colon.write_annotation(root, video, frame, boxes)
            stem = f"{video}_{frame}"
            pixels = real_colon.image(video, frame)
            real_colon.write_image(root / f"{video}_frames/{stem}.jpg", pixels)
            real_colon.write_targets(root, video, stem, boxes)
    return root


def module(root, **changes):
    arguments = {
        "synthetic": str(root),
        "split": "counts",
        "train_objects": 7,
        "validation_objects": 2,
        "calibration_objects": 1,
        "test_objects": 4,
        "streams": ("rgb_mask_depth", "relative_depth"),
        "size": 16,
        "batch_size": 8,
        "frames_per_object": 4,
        "eval_frames_per_object": 5,
        "augmentation": "dihedral",
    } | changes
    return PolypSizingDataModule(**arguments)


def rows(loader):
    return [row for batch in loader for row in batch["frame"].tolist()]


def test_parts_share_no_object_and_draw_what_was_asked(rendered):
    data = loaded(rendered)
    table = data.frame_table
    parts = ("train", "validation", "test", "calibration")
    drawn = {part: rows(data.loader(part)) for part in parts}
    objects = {part: {table.object_codes[row] for row in found} for part, found in drawn.items()}
    assert [len(objects[part]) for part in parts] == [7, 2, 4, 1]
    assert len(set.union(*objects.values())) == OBJECTS
    assert [len(drawn[part]) for part in parts] == [28, 10, 20, 5]
    assert [len(data.loader(part)) for part in parts] == [4, 2, 3, 1]
    assert drawn["test"] == sorted(drawn["test"])
    assert [row for row in drawn["test"] if table.frames["frame_id"][row] == 5] == []
    assert next(iter(data.train_dataloader()))["streams"]["rgb_mask_depth"].shape == (8, 5, 16, 16)
    assert data.report.findings == {}
    assert set(table.frames["database"]) == {"SYNTH"}


def test_equal_seeds_give_equal_batches(rendered):
    def first(**changes):
        data = loaded(rendered, **changes)
        return next(iter(data.train_dataloader()))

    expected = first(seed=4)
    same = first(seed=4)
    assert same["frame"].tolist() == expected["frame"].tolist()
    assert torch.equal(same["streams"]["relative_depth"], expected["streams"]["relative_depth"])
    assert first(seed=5)["frame"].tolist() != expected["frame"].tolist()


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "validation": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append((self.current_epoch, batch["frame"].tolist()))
        return self.weight * batch["size_mm"].sum()

    def validation_step(self, batch, batch_idx):
        self.seen["validation"].append(batch["frame"].tolist())

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch["frame"].tolist())
        return batch["size_mm"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_lightning_trains_validates_and_predicts(rendered, tmp_path):
    data, recorder = module(rendered), Recorder()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(recorder, datamodule=data)
    epochs = [[r for e, b in recorder.seen["train"] if e == epoch for r in b] for epoch in (0, 1)]
    for epoch, found in enumerate(epochs):
        assert found == data.loader("train").sampler.rows.draw(epoch).tolist()
    assert epochs[0] != epochs[1]
    validation = [row for batch in recorder.seen["validation"] for row in batch]
    assert validation == 2 * rows(data.val_dataloader())
    trainer.predict(recorder, datamodule=data)
    assert [row for batch in recorder.seen["predict"] for row in batch] == rows(
        data.test_dataloader()
    )


def test_ranks_share_rows_and_lightning_leaves_them_alone(rendered, refused):
    def shard(rank, world, **changes):
        data = module(rendered, **changes)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        data.setup("fit")
        return data

    whole = rows(shard(0, 1).train_dataloader())
    loaders = [shard(rank, 2).train_dataloader() for rank in range(2)]
    assert all(isinstance(loader.sampler, DistributedSampler) for loader in loaders)
    first, second = (rows(loader) for loader in loaders)
    assert [row for pair in zip(first, second, strict=True) for row in pair] == whole
    third = shard(1, 3, batch_size=9).test_dataloader()
    assert rows(third) == rows(shard(0, 1).test_dataloader())[1::3]
    refused("batch_size 8 cannot be shared evenly by 3 processes", shard(0, 3).train_dataloader)


def test_folds_of_patients(rendered):
    data = loaded(rendered, split="made", num_folds=4, fold=3)
    assert data.folds.name == "4 folds of patients, made with seed 1"
    of = np.array([data.folds.assignment[name] for name in data.frame_table.frames["unique_id"]])
    assert (set(of[data.parts.test]), set(of[data.parts.validation])) == ({3}, {0})
    assert set(of[data.parts.train]) == {1, 2}


def test_weighted_samplers_take_as_many_steps(rendered):
    for name in ("class", "effective"):
        data = loaded(rendered, sampler=name)
        found = rows(data.train_dataloader())
        assert len(found) == 28
        assert {data.frame_table.object_codes[row] for row in found} <= {
            data.frame_table.object_codes[row] for row in data.parts.train
        }


def test_data_are_described_once_and_real_folders_are_not_listed(
    rendered, real_colon, tmp_path, monkeypatch
):
    described = []
    plain = Data.of
    monkeypatch.setattr(
        Data, "of", lambda name, *rest: described.append(name) or plain(name, *rest)
    )
    data = module(rendered)
    (first,) = data.digest()
    assert (first.name, first.role, first.unit) == ("synthetic", "frames", "bytes")
    assert data.variant(seed=3).digest() == data.digest() == [first]
    assert described == ["synthetic"]
    (found,) = module(None, synthetic=None, real_colon=str(rendered)).digest()
    assert described == ["synthetic"]
    assert (found.size, found.unit, found.listing) == (6 * OBJECTS, "rows", True)
    other = tmp_path / "other"
    shutil.copytree(rendered, other)
    assert module(None, synthetic=None, real_colon=str(other)).digest() == [found]
    real_colon.write_annotation(other, "000-001", 0, {"000-001_1": (1, 2, 3, 5)})
    assert module(None, synthetic=None, real_colon=str(other)).digest() != [found]


def test_a_cache_changes_nothing_and_holds_drawable_rows_only(rendered, tmp_path):
    plain = loaded(rendered, frames_per_object=1)
    data = module(rendered, frames_per_object=1, cache_folder=str(tmp_path), cache_epochs=2)
    planned = data.plan_cache().planned_bytes()
    assert list(tmp_path.iterdir()) == []
    data.prepare_data()
    data.setup("fit")
    held = set(data.cache.slots)
    drawn = {row for epoch in (0, 1) for row in data.loader("train").sampler.rows.draw(epoch)}
    others = {
        row for part in ("validation", "test", "calibration") for row in rows(data.loader(part))
    }
    assert held == drawn | others
    assert len(drawn) < len(data.parts.train)
    assert planned == len(held) * (16 * 16 * 5 + 16 * 16 // 8 + 1)
    for epoch in range(4):  # epochs beyond the cache are decoded
        loaders = [m.train_dataloader() for m in (plain, data)]
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for expected, found in zip(*loaders, strict=True):
            assert found["frame"].tolist() == expected["frame"].tolist()
            for name, stream in expected["streams"].items():
                assert torch.equal(found["streams"][name], stream)


def test_a_frame_that_the_cache_cannot_read_is_left_out_and_reported(real_colon, tmp_path, damage):
    root = real_colon.official(tmp_path / "colon", frames=60)
    folds = tmp_path / "f.csv"
    folds.write_text("unique_id,kfold_id\n001-001_1,2\n001-001_2,2\n001-002_1,1\n002-001_1,0\n")
    data = PolypSizingDataModule(
        real_colon=str(root),
        split="file",
        split_file=str(folds),
        size=16,
        cache_folder=str(tmp_path / "cache"),
    )
    table = data.load()
    row = int(data.parts.train[3])
    path = table.path(row)
    damage(path)
    before = len(data.parts.train)
    data.eval_frames_per_object = data.frames_per_object = 60
    data.prepare_data()
    data.setup("fit")
    assert row not in data.parts.train
    assert before - len(data.parts.train) == data.report.count("image cannot be decoded") in (1, 2)
    assert data.report.unreadable == [str(path)]
    assert row not in rows(data.train_dataloader())


def test_another_fold_has_a_cache_of_its_rows_that_is_announced_first(rendered, tmp_path):
    data = module(
        rendered, split="made", num_folds=5, frames_per_object=1, cache_epochs=1,
        eval_frames_per_object=1, cache_folder=str(tmp_path),
    )  # fmt: skip
    told = []
    data.announce = lambda line: told.append((line, len(list(tmp_path.glob("frames-*")))))
    for fold in (0, 3):
        other = data.variant(fold=fold)
        other.prepare_data()
        other.prepare_data()
        drawn = [other._sampler("train", 0, 1).draw(0), other.evaluation_rows("test")]
        assert all(row in other.cache for row in np.concatenate(drawn))
    assert data.variant(fold=0).cache is data.cache
    assert [caches for _, caches in told] == [0, 1]
    assert told[1][0].startswith(f"cache of {OBJECTS} frames: 0.0 MB")


def test_sources_are_joined(real_colon, sun, tmp_path):
    data = PolypSizingDataModule(
        real_colon=str(real_colon.official(tmp_path / "colon")),
        sun=str(sun.official(tmp_path / "sun")),
        size=16,
        fold=0,
        split="made",
        num_folds=3,
    )
    data.setup("fit")
    assert (len(data.frame_table.unique_ids), data.report.found) == (8, 88)
    assert set(data.frame_table.frames["database"]) == {"REALC", "SUN"}
    assert next(iter(data.train_dataloader()))["streams"]["rgb"].shape[1:] == (3, 16, 16)
    saved = data.frame_table.write_parquet(tmp_path / "a.parquet")
    again = PolypSizingDataModule(table=str(saved), split="made", num_folds=3)
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in data.frame_table.roots.items():
            patch.setenv(name, folder)
        again.setup("fit")
    assert again.parts.test.tolist() == data.parts.test.tolist()


def test_objects_without_a_fold_are_noted(real_colon, tmp_path):
    root = real_colon.official(tmp_path / "colon")
    path = tmp_path / "f.csv"
    path.write_text("unique_id,kfold_id\n001-001_1,0\n001-002_1,1\n002-001_1,2\n")
    data = PolypSizingDataModule(real_colon=str(root), split="file", split_file=str(path))
    data.setup("fit")
    assert data.report.findings == {
        ("noted", "object is in no fold of folds of f.csv"): ["001-001_2"]
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"synthetic": None}, "no source is named: give one of table, real_colon"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"split": "hag6"}, "split hag6 needs split_file"),
        ({"streams": ("nbi",)}, "stream 'nbi' is unknown"),
        ({"train_objects": 90}, "14 objects cannot give 90"),
        ({"split": "audit5"}, "covers REAL-Colon and SUN, found SYNTH"),
        ({"calibration_objects": 0}, "the calibration part is empty"),
    ],
)
def test_wrong_arguments_are_refused(rendered, options, words, refused):
    refused(
        words,
        lambda: loaded(rendered, **options).loader("calibration"),
        error=(ValueError, GatesError),
    )


def loaded(root, **changes):
    data = module(root, **changes)
    data.setup("fit")
    return data
