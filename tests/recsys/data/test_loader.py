from itertools import chain

import numpy as np
import polars as pl
import pytest
import torch

from core_gates.errors import GatesError
from recsys.data.datamodule import EvaluationLoader, PackedRows, TrainingLoader
from recsys.transform import FeatureTransform


@pytest.fixture
def rows(tables):
    transform = FeatureTransform(tables.schema).fit(tables.train)
    return PackedRows.of(tables.train, transform)


def places(batches):
    return [batch.dense[:, 0].long().tolist() for batch in batches]


def test_an_epoch_has_every_row_at_most_once(rows):
    loader = TrainingLoader(rows, 20, seed=3)
    batches = places(loader)
    assert [len(batch) for batch in batches] == [20] * 5 == [20] * len(loader)
    seen = [*chain(*batches)]
    assert len(set(seen)) == 100
    assert seen != sorted(seen)


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


def test_rows_as_given(rows):
    assert places(TrainingLoader(rows, 25, order="given")) == np.arange(100).reshape(4, 25).tolist()


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


@pytest.mark.parametrize("seen", [0, 1, 4, 5])
def test_a_position_is_restored_exactly(rows, seen):
    loader = TrainingLoader(rows, 20)
    loader.set_epoch(2)
    whole = places(loader)
    running = iter(loader)
    for _ in range(seen):
        next(running)
    state = loader.state_dict()
    resumed = TrainingLoader(rows, 20)
    resumed.load_state_dict(state)
    assert places(resumed) == whole[seen % 5 :]
    assert places(resumed) == whole  # the pass after it begins at the first batch


def test_few_rows_make_one_batch(rows):
    assert [len(batch) for batch in TrainingLoader(rows, 4096)] == [103]
    assert [len(batch) for batch in TrainingLoader(rows, 4096, rank=1, world=2)] == [51]


FAULTS = {
    "batch of one": (1, 1, "a training batch has 1 rows"),
    "one row for each of two": (2, 2, "a training batch has 2 rows for 2 processes"),
    "odd": (21, 2, "batch_size 21 cannot be split evenly by 2 processes"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_batches_that_cannot_be_normalized_are_refused(case, rows):
    size, world, words = FAULTS[case]
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
    nobody = tables.train.with_columns(user=pl.lit(None, pl.Int64))
    table = pl.concat([nobody] * 3)
    rows = PackedRows.of(table, FeatureTransform(tables.schema).fit(tables.train))
    counts = [len(EvaluationLoader(rows, 500, rank=r, world=3).indices) for r in range(3)]
    assert sum(counts) == 309
    assert min(counts) > 60
