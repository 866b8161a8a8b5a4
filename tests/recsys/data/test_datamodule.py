"""Batches of tables: order, resumption, packed rows, rows that are seen twice."""

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
from recsys.data import datamodule
from recsys.data.datamodule import EvaluationLoader, PackedRows, TableDataModule, TrainingLoader
from recsys.data.readers.own_table import OwnTable
from recsys.data.tables import RankingTables, refuse_seen_rows
from recsys.inputs import Batch
from recsys.schema import FeatureSchema, History, Sparse, Task
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
    assert (one.transform.sizes, one.transform.fitted.rows) == (other.transform.sizes, 103)
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
    assert (state["fitted"]["rows"], state["trained_on"]) == (103, data.training_objects())
    other = TableDataModule(tables._replace(train=tables.train[::-1]))
    assert other.training_objects() != data.training_objects()


def test_faults_name_the_part(tables, refuses):
    empty = TableDataModule(tables._replace(validation=tables.validation[:0]))
    wrong = TableDataModule(tables._replace(test=tables.test.with_columns(y=2)))
    refuses(
        GatesError,
        ("the validation part of toy is empty", lambda: empty.setup("fit")),
        ("toy, test: row 0, column 'y': it is 2", lambda: wrong.setup("test")),
    )
    refuses(ValueError, ("order is 'random'", lambda: TableDataModule(tables, order="random")))


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
    train = tables.train.with_columns(w=pl.Series(np.arange(len(tables.train)) == 50))
    assert len(TableDataModule(tables._replace(schema=schema, train=train)).rows("train")) == 103


@pytest.fixture
def rows(tables):
    return PackedRows.of(tables.train, FeatureTransform(tables.schema).fit(tables.train))


def places(batches):
    return [batch.dense[:, 0].long().tolist() for batch in batches]


def test_the_order_depends_on_seed_and_epoch_alone(rows):
    loader = TrainingLoader(rows, 20, seed=3)
    first, again = places(loader), places(loader)
    assert first == again == places(TrainingLoader(rows, 20, seed=3))
    loader.set_epoch(1)
    second = places(loader)
    assert first != second
    assert second != places(TrainingLoader(rows, 20, seed=4))
    loader.sampler.set_epoch(0)
    assert places(loader) == first
    loader.load_state_dict(loader.state_dict())  # of a complete pass
    assert places(loader) == first


@pytest.mark.parametrize("order", ["shuffled", "given"])
@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_batches_of_one_process(rows, order, world):
    whole = places(TrainingLoader(rows, 20, order=order))
    shards = [
        places(TrainingLoader(rows, 20, order=order, rank=rank, world=world))
        for rank in range(world)
    ]
    for batch, *parts in zip(whole, *shards, strict=True):
        assert {len(part) for part in parts} == {20 // world}
        assert sorted(chain(*parts)) == sorted(batch)


def test_few_rows_make_one_batch(rows):
    assert [len(batch) for batch in TrainingLoader(rows, 4096)] == [103]
    assert [len(batch) for batch in TrainingLoader(rows, 4096, rank=1, world=2)] == [51]


FAULTS = {
    "batch of one": (1, 1, "a training batch has 1 rows"),
    "one row for each of two": (2, 2, "a training batch has 2 rows for 2 processes"),
    "odd": (21, 2, "batch_size 21 cannot be split evenly by 2 processes"),
}


@pytest.mark.parametrize(("size", "world", "words"), FAULTS.values(), ids=FAULTS)
def test_batches_that_cannot_be_normalized_are_refused(size, world, words, rows):
    with pytest.raises(GatesError, match=words):
        TrainingLoader(rows, size, world=world)


def test_one_training_row_is_refused(rows):
    with pytest.raises(GatesError, match="give more training rows than 1"):
        TrainingLoader(PackedRows(rows.take(slice(0, 1))), 16)


def test_evaluation_reads_all_rows_in_order(rows):
    loader = EvaluationLoader(rows, 25)
    batches = places(loader)
    assert len(batches) == len(loader) == 5
    assert max(map(len, batches)) <= 25
    assert [*chain(*batches)] == list(range(103))


@pytest.mark.parametrize("world", [2, 3])
def test_evaluation_keeps_users_on_one_rank(rows, world):
    loaders = [EvaluationLoader(rows, 10, rank=rank, world=world) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    seen = [torch.cat([batch.dense[:, 0] for batch in loader]).long() for loader in loaders]
    assert sorted(torch.cat(seen).tolist()) == list(range(103))
    users = [set(rows.user[places].tolist()) for places in seen]
    assert all(users)
    assert not set.intersection(*users)
    for loader, found in zip(loaders, seen, strict=True):
        assert loader.indices.tolist() == found.tolist()


def test_no_rows_to_evaluate(rows):
    assert list(EvaluationLoader(PackedRows(rows.take(slice(0, 0))), 8)) == []


@pytest.mark.fault("video R1")
def test_rows_without_a_user_are_spread_over_ranks(tables):
    """As one user of 300 rows they would all be evaluated by one rank."""
    table = pl.concat([tables.train.with_columns(user=pl.lit(None, pl.Int64))] * 3)
    rows = PackedRows.of(table, FeatureTransform(tables.schema).fit(tables.train))
    counts = [len(EvaluationLoader(rows, 500, rank=r, world=3).indices) for r in range(3)]
    assert sum(counts) == 309
    assert min(counts) > 60


@pytest.fixture
def batch():
    return Batch(
        torch.arange(12).reshape(6, 2),
        torch.rand(6, 3),
        (torch.arange(24).reshape(6, 4),),
        torch.tensor([[0.0], [1], [1], [0], [1], [0]]),
        torch.tensor([[True], [False]] * 3),
        torch.rand(6),
        torch.arange(6) + 2**40,
    )


def equal(one, other):
    for a, b in zip(
        [*one.plain(), *one.sequences], [*other.plain(), *other.sequences], strict=True
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([5, 0, 0]), slice(None)], ids=str)
@pytest.mark.parametrize("narrow", [True, False])
def test_rows_come_back_as_they_were(batch, rows, narrow):
    equal(PackedRows(batch, narrow=narrow).take(rows), batch.take(rows))


def test_they_take_less_memory(batch):
    wide = sum(t.numel() * t.element_size() for t in [*batch.plain(), *batch.sequences])
    stored = PackedRows(batch)
    assert (stored.bytes, len(stored)) == (wide - 12 * 4 - 24 * 4 - 6 * 3, 6)
    assert torch.equal(stored.user, batch.user)


def test_chunks_join_without_seams(monkeypatch):
    schema = FeatureSchema((Task("y"),), (Sparse("a"),), sequences=(History("h", of="a"),))
    table = pl.DataFrame(
        {"a": [1, 2, 3, 1, 2], "h": [[1], [], [2, 3], None, [1]], "y": [0, 1] * 2 + [1]}
    )
    transform = FeatureTransform(schema).fit(table)
    whole = transform.batch(table)
    monkeypatch.setattr(datamodule, "CHUNK", 2)
    equal(PackedRows.of(table, transform).take(slice(None)), whole)
    assert whole.user.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.fault("video R1")
def test_rows_without_a_user_stay_apart_where_tables_are_joined(batch):
    """Row n of each table has the number -1 - n, such as that of each fold of a comparison."""
    one = batch.replace(user=torch.tensor([7, -2, -3, 8, -5, 7]))
    joined = Batch.cat([one, one.take(slice(0, 3)), one])
    assert joined.user[joined.user >= 0].tolist() == [7, 8, 7, 7, 7, 8, 7]
    assert len(joined.user[joined.user < 0].unique()) == 3 + 2 + 3
    equal(Batch.cat([batch, batch]).take(slice(6, 12)), batch)


@pytest.mark.fault("video H4")
def test_test_rows_that_are_known_are_refused_in_any_order_and_type(tables):
    shuffled = tables.train.sample(fraction=1.0, shuffle=True, seed=1)
    for test in (tables.train, shuffled, shuffled[:20], tables.validation,
                 shuffled.cast({"user": pl.Int32, "y": pl.Float64})):  # fmt: skip
        with pytest.raises(GatesError, match="test rows equal training or validation rows, so"):
            TableDataModule(tables._replace(test=test)).setup("fit")


@pytest.mark.fault("video H4")
def test_a_few_known_test_rows_are_counted(tables):
    test = pl.concat([tables.test, tables.train[:5], tables.validation[:3]])
    data = TableDataModule(tables._replace(test=test))
    assert data.notes[-1] == "8 of 25 test rows equal training or validation rows"
    assert data.digest() == TableDataModule(tables._replace(test=test, notes=("a",))).digest()
    changed = test.with_columns(place=pl.col("place") + 0.5)
    assert TableDataModule(tables._replace(test=changed)).doubts[1:] == ()


@pytest.mark.fault("video H4")
def test_rows_of_few_values_are_equal_without_being_known():
    schema = FeatureSchema((Task("y"),), (Sparse("c"),), sequences=(History("h", of="c"),))

    def rows(count):
        values = [number % 5 for number in range(count)]
        return pl.DataFrame({"c": values, "h": [[v, v] for v in values], "y": [0] * count})

    found = refuse_seen_rows(RankingTables("few", schema, rows(50), rows(20), rows(30)))
    assert found == (
        "30 of 30 test rows equal training or validation rows, as 100% of the training rows equal "
        "others",
    )


@pytest.mark.fault("video H4")
def test_a_table_is_not_tested_on_itself(tables, tmp_path):
    path, link = tmp_path / "log.parquet", tmp_path / "link.parquet"
    tables.train.with_columns(user=pl.lit(1), item=pl.lit(2), place=pl.lit(3)).write_parquet(path)
    link.symlink_to(path)
    for test in (path, link, tmp_path):
        with pytest.raises(GatesError, match="is tested on itself"):
            OwnTable(str(path), ["y"], test_path=str(test)).read()
