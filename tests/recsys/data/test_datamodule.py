import dataclasses
from itertools import chain

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from core_gates.errors import GatesError
from harness.runs.callbacks import RunCheckpoint
from harness.runs.loops import ExactTrainer
from harness.runs.terminal import quiet_lightning
from recsys.data.datamodule import TableDataModule
from recsys.transform import FeatureTransform


class Toy(L.LightningModule):
    """Records the rows it sees, and learns something from their order."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch.dense[:, 0].long().tolist())
        logits = self.layer(batch.dense[:, :1] / 100)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)

    def validation_step(self, batch, index):
        self.log("val/rows", float(len(batch)), batch_size=len(batch), reduce_fx="sum")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.fixture
def fit(tables, tmp_path):
    quiet_lightning()

    def run(name, max_steps=-1, **options):
        seed_everything(1)
        folder, module = tmp_path / name, Toy()
        last = folder / "checkpoints" / "last.ckpt"
        trainer = ExactTrainer(
            max_steps=max_steps,
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            callbacks=[RunCheckpoint(every_n_steps=1)],
        )
        data = TableDataModule(tables, batch_size=20, seed=7, **options)
        resume = str(last) if last.is_file() else None
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return module, trainer

    return run


@pytest.mark.parametrize("stops", [[2], [5], [6, 13], [10]])
def test_a_stopped_training_resumes_at_the_exact_next_batch(fit, stops):
    whole, _ = fit("whole")
    seen = []
    for stop in [*stops, -1]:
        part, _ = fit("broken", stop)
        seen += part.seen
    assert seen == whole.seen
    assert torch.equal(part.layer.weight, whole.layer.weight)


def test_epochs_are_shuffled_and_validated_whole(fit):
    module, trainer = fit("run")
    epochs = [module.seen[k : k + 5] for k in (0, 5, 10)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert all(len(set(chain(*epoch))) == 100 for epoch in epochs)
    assert trainer.callback_metrics["val/rows"] == 31


def test_time_order(fit):
    module, _ = fit("run", order="given")
    assert [*chain(*module.seen[:5])] == list(range(100))


def test_only_training_rows_are_learned_from(tables):
    changed = tables._replace(test=tables.test.with_columns(item=999, place=1e9))
    one, other = TableDataModule(tables), TableDataModule(changed)
    one.setup("fit")
    other.setup("fit")
    assert one.transform.sizes == other.transform.sizes
    assert one.transform.fitted.rows == 103
    assert (other.batch("test").sparse[:, 1] == 0).all()
    assert (one.batch("test").sparse[:, 1] > 0).any()


def test_a_given_transform_is_used(tables):
    few = FeatureTransform(tables.schema).fit(tables.train[:5])
    data = TableDataModule(tables, transform=few)
    data.setup("fit")
    assert data.transform is few
    assert int(data.batch("train").sparse.max()) < max(few.sizes.values())


def test_a_source_is_read_once(tables):
    class Source:
        reads = 0

        def read(self):
            self.reads += 1
            return tables

    source = Source()
    data = TableDataModule(source)
    for stage in ("fit", "test", "fit"):
        data.setup(stage)
    assert source.reads == 1
    assert [one.role for one in data.digest()] == ["train", "validation", "test"]
    assert [one.size for one in data.digest()] == [103, 31, 17]


def test_checkpoints_state_what_was_learned_from(tables):
    data = TableDataModule(tables)
    data.setup("fit")
    state = data.state_dict()
    assert state["fitted"]["rows"] == 103
    assert state["trained_on"] == data.training_objects()
    other = TableDataModule(tables._replace(train=tables.train[::-1]))
    assert other.training_objects() != data.training_objects()


def test_faults_name_the_part(tables):
    empty = TableDataModule(tables._replace(validation=tables.validation[:0]))
    with pytest.raises(GatesError, match="the validation part of toy is empty"):
        empty.setup("fit")
    wrong = TableDataModule(tables._replace(test=tables.test.with_columns(y=2)))
    with pytest.raises(GatesError, match="toy, test: row 0, column 'y': it is 2"):
        wrong.setup("test")
    with pytest.raises(ValueError, match="order is 'random'"):
        TableDataModule(tables, order="random")


@pytest.mark.fault("video V25")
@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_rows_without_any_weight_are_refused(tables, part):
    """Their loss would be 0, and the network that has learned nothing the best."""
    schema = dataclasses.replace(tables.schema, weight="w")
    weights = {"train": 1, "validation": 1, "test": 1} | {part: 0}
    parts = {n: tables.part(n).with_columns(w=weight) for n, weight in weights.items()}
    data = TableDataModule(tables._replace(schema=schema, **parts))
    for name in weights:
        if name != part:
            assert len(data.rows(name)) == len(tables.part(name))
    for _ in range(2):
        with pytest.raises(GatesError, match=f"no row of the {part} part of toy counts for any"):
            data.rows(part)


def test_one_row_with_a_weight_is_enough(tables):
    schema = dataclasses.replace(tables.schema, weight="w")
    places = np.arange(len(tables.train))
    train = tables.train.with_columns(w=pl.Series(places == 50))
    data = TableDataModule(tables._replace(schema=schema, train=train))
    assert len(data.rows("train")) == 103
