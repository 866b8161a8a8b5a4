import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from lightning.pytorch import seed_everything

from core_gates.errors import GatesError
from harness.runs.callbacks import RunCheckpoint
from harness.runs.loops import ExactTrainer
from harness.runs.terminal import quiet_lightning
from video_multitask.feed import add_context, add_sides
from video_multitask.sources.simulated import SimulatedStream
from video_multitask.stream.parquet_stream import ParquetStream
from video_multitask.stream.shards import Period, Periods, last_days, write_shards

pytest.importorskip("recsys.transform")

STEPS = 24


@pytest.fixture(scope="module")
def shards(feed, tmp_path_factory):
    log = add_context(add_sides(feed.log, feed.users, feed.videos))
    return write_shards([log], tmp_path_factory.mktemp("parquet") / "s", row_group=256)


@pytest.fixture(scope="module")
def transform(shards):
    return stream_of(shards).transform


def stream_of(shards, **options):
    days = Periods(
        Period(20220408, 20220412), Period(20220413, 20220413), Period(20220414, 20220415, False)
    )
    options = {"schema": SimulatedStream().schema()} | options
    return ParquetStream(shards, days, batch_size=160, window=500, seed=4, **options)


class Module(L.LightningModule):
    """Learns from every column, with dropout, so that order and random states matter."""

    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(width, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 14)
        )
        self.losses = []

    def training_step(self, batch, _):
        inputs = torch.cat([batch.sparse % 7, batch.dense], 1).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(self.net(inputs), batch.labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("val/rows", float(len(batch)), reduce_fx="sum")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(shards, transform, folder, max_steps, workers):
    quiet_lightning()
    seed_everything(1)
    stream = stream_of(shards, transform=transform, workers=workers)
    module = Module(len(transform.sparse_tables) + transform.dense_width)
    trainer = ExactTrainer(
        max_steps=max_steps, max_epochs=9, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[RunCheckpoint(every_n_steps=1)], num_sanity_val_steps=0,
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, stream, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    return module.losses


@pytest.mark.parametrize(
    ("workers", "stops"), [(0, [5, 23]), (2, [7])], ids=["in the process", "two workers"]
)
def test_a_stopped_training_resumes_at_the_exact_next_batch(
    shards, transform, tmp_path, workers, stops
):
    whole = fit(shards, transform, tmp_path / "whole", STEPS + 4, workers)
    parts = []
    for stop in [*stops, STEPS + 4]:
        parts += fit(shards, transform, tmp_path / "parts", stop, workers)
    assert len(whole) == len(set(whole)) == STEPS + 4
    assert parts == whole


def test_workers_of_an_epoch_share_its_rows(shards, transform):
    loader = stream_of(shards, transform=transform, workers=2).train_dataloader()
    in_process = [
        stream.batch(number) for number in range(loader.plan.batches) for stream in readers(loader)
    ]
    for found, expected in zip(loader, in_process, strict=True):
        assert all(a.equal(b) for a, b in zip(found.plain(), expected.plain(), strict=True))


def readers(loader):
    from video_multitask.stream.loader import StreamReader

    return [
        StreamReader(loader.shards, loader.encoder, loader.plan, stream, 0)
        for stream in range(loader.plan.streams)
    ]


def test_the_transform_learns_from_training_days_alone(shards, transform):
    train = shards.select(20220408, 20220412)
    assert transform.fitted.rows == train.rows
    log = pl.concat(train.parts(["user_id"]))
    assert transform.sizes["user_id"] == 2 + log["user_id"].n_unique()


def test_validation_and_test_have_all_their_rows(shards, transform):
    stream = stream_of(shards, transform=transform)
    rows = [sum(map(len, stream.evaluation_loader(p))) for p in ("validation", "test")]
    assert rows[0] == shards.select(20220413, 20220413).rows
    assert rows[1] == shards.select(20220414, 20220415, False).rows
    labels = torch.cat([b.labels for b in stream.test_dataloader()]).mean(0)
    log = pl.concat(shards.select(20220414, 20220415, False).parts(["is_click"]))
    assert labels[0] == pytest.approx(log["is_click"].mean(), abs=1e-6)


def test_parts_are_described_by_their_files(shards, transform):
    digest = stream_of(shards, transform=transform).digest()
    assert [(d.role, d.size) for d in digest] == [
        ("train", shards.select(20220408, 20220412).rows),
        ("validation", shards.select(20220413, 20220413).rows),
        ("test", shards.select(20220414, 20220415, False).rows),
    ]
    assert len({d.sha256 for d in digest}) == 3
    objects = stream_of(shards, transform=transform).training_objects()
    assert len(objects) == len(shards.select(20220408, 20220412).files)


def test_last_days_validate_and_test(shards):
    days = last_days(shards, validation=2, test=3, random=False)
    assert days.train == (20220408, 20220503, False)
    assert days.validation == (20220504, 20220505, False)
    assert days.test == (20220506, 20220508, False)
    with pytest.raises(
        GatesError, match="has 31 days, of which 31 validate and test; none is left"
    ):
        last_days(shards, validation=30, test=1)


def test_wrong_settings_are_refused(shards, transform):
    with pytest.raises(ValueError, match="needs a schema, or a fitted transform"):
        stream_of(shards, schema=None)
    nobody = stream_of(shards, transform=transform, scored=1e-9)
    with pytest.raises(GatesError, match="no row of the validation days is of the 1e-09 of the us"):
        nobody.setup("fit")
    stream_of(shards, transform=transform, scored=0.3).setup("fit")  # some groups hold none of them
    stream = stream_of(shards, transform=transform)
    stream.trainer = type("Trainer", (), {"global_rank": 1, "world_size": 3})
    with pytest.raises(GatesError, match="batch_size 160 cannot be split evenly by 3 processes"):
        stream.train_dataloader()
    stream.trainer = type("Trainer", (), {"global_rank": 1, "world_size": 2})
    loader = stream.train_dataloader()
    assert (loader.plan.streams, loader.plan.batch_size, loader.rank) == (2, 80, 1)
    first = next(iter(loader))
    assert np.isin(first.user.numpy(), pl.concat(shards.parts(["user_id"]))["user_id"]).all()
