import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from recsys.inputs import Batch
from recsys.schema import Dense, FeatureSchema, Sparse, Task
from video_multitask.stream.loader import (
    EvaluationStream,
    StreamLoader,
    StreamPlan,
    StreamReader,
    columns_of,
)
from video_multitask.stream.shards import Group, write_shards

# Files of full row groups of 8, the last one of each smaller.
files = st.lists(st.integers(8, 60), min_size=1, max_size=8)
orders = st.sampled_from(["time", "shuffled"])


def groups_of(rows):
    groups = []
    for number, count in enumerate(rows):
        sizes = [8] * (count // 8) + ([count % 8] if count % 8 else [])
        groups += [Group(f"{number}.parquet", k, size) for k, size in enumerate(sizes)]
    return tuple(groups)


def plan_of(rows, streams, order, **options):
    groups = groups_of(rows)
    if len(groups) < 2 * streams:
        streams = 1
    return StreamPlan(groups, streams, batch_size=2, order=order, **options)


@given(files, st.integers(1, 4), orders, st.integers(0, 3))
def test_streams_are_disjoint_and_complete(rows, streams, order, epoch):
    plan = plan_of(rows, streams, order, window=20)
    read = [g for k in range(plan.streams) for w in plan.windows(k, epoch) for g in w.groups]
    assert sorted(read) == sorted(plan.groups)


@given(files, st.integers(1, 4), orders, st.integers(0, 5))
def test_every_epoch_has_equally_many_rows_in_each_stream(rows, streams, order, epoch):
    plan = plan_of(rows, streams, order, window=20)
    sizes = [
        [sum(w.rows for w in plan.windows(k, e)) for k in range(plan.streams)] for e in (0, epoch)
    ]
    assert (sizes[0], plan.batches) == (sizes[1], min(sizes[0]) // 2)
    assert max(sizes[0]) - min(sizes[0]) <= 8


@given(files, orders, st.sampled_from([0, 5, 20, 1000]))
def test_windows_follow_each_other_and_are_permuted(rows, order, window):
    plan = plan_of(rows, 1, order, window=window, seed=3)
    windows = plan.windows(0, 0)
    ends = np.cumsum([w.rows for w in windows])
    assert [w.first for w in windows] == [0, *ends[:-1]]
    for w in windows:
        assert w.rows == sum(group.rows for group in w.groups)
        assert w.rows >= window or w is windows[-1]
        assert sorted(plan.permutation(0, 0, w)) == list(range(w.rows))


def test_time_order_keeps_groups_in_order_and_shuffled_order_changes_each_epoch():
    rows = [80] * 6
    plan = plan_of(rows, 2, "time", window=8)
    for stream in (0, 1):
        read = [g for w in plan.windows(stream, 0) for g in w.groups]
        assert read == sorted(read)
        assert read == [g for w in plan.windows(stream, 4) for g in w.groups]
    shuffled = plan_of(rows, 2, "shuffled", window=8)
    first, second = (shuffled.windows(0, epoch) for epoch in (0, 1))
    assert [w.groups for w in first] != [w.groups for w in second]
    assert [w.groups for w in first] == [w.groups for w in shuffled.windows(0, 0)]


def test_rows_are_permuted_differently_in_each_window_epoch_stream_and_seed():
    plan = plan_of([800], 2, "time", window=80)
    w = plan.windows(0, 0)
    permutations = [
        plan.permutation(0, 0, w[0]),
        plan.permutation(0, 0, w[1]),
        plan.permutation(1, 0, w[0]),
        plan.permutation(0, 1, w[0]),
        plan_of([800], 2, "time", window=80, seed=1).permutation(0, 0, w[0]),
    ]
    assert len({tuple(p) for p in permutations}) == 5
    assert plan_of([800], 2, "time", window=0).permutation(0, 0, w[0]).tolist() == list(range(80))


def test_too_few_rows_are_refused(refuses):
    with pytest.raises(GatesError, match="16 rows in 2 row groups give no batch of 4 to each of 3"):
        StreamPlan(groups_of([16]), 3, 4)
    refuses(
        ValueError,
        (
            "order is 'random'; choose one of time, shuffled",
            lambda: StreamPlan(groups_of([16]), 1, 4, order="random"),
        ),
        ("batch_size must be at least 1", lambda: StreamPlan(groups_of([16]), 1, 0)),
    )


SCHEMA = FeatureSchema(
    tasks=(Task("long_view"),),
    sparse=(Sparse("user_id", side="user"), Sparse("row")),
    dense=(Dense("time_ms"),),
    user="user_id",
)


class Raw:
    """Encodes nothing: batches hold the values of the table."""

    schema = SCHEMA

    def __init__(self):
        self.read = 0

    def batch(self, table, *, labels=True, first_row=0):
        self.read += len(table)
        sparse = torch.from_numpy(
            table.select("user_id", "row").cast(pl.Int64).to_numpy(writable=True)
        )
        label = torch.tensor(table["long_view"].to_list()).float()[:, None]
        rows = len(table)
        return Batch(
            sparse, torch.zeros(rows, 2), (), label, torch.ones(rows, 1, dtype=torch.bool),
            torch.ones(rows), sparse[:, 0],
        )  # fmt: skip


@pytest.fixture(scope="module")
def shards(feed, tmp_path_factory):
    log = feed.log[:6_000].with_row_index("row")
    return write_shards([log], tmp_path_factory.mktemp("stream") / "s", row_group=100)


def loader_of(shards, *, world=1, rank=0, epoch=0, batch_size=64, **options):
    plan = StreamPlan(tuple(shards.groups), world, batch_size, **{"window": 700} | options)
    loader = StreamLoader(shards, Raw(), plan, rank=rank, world=world)
    loader.set_epoch(epoch)
    return loader


def rows_of(batches):
    return [batch.sparse[:, 1].tolist() for batch in batches]


@pytest.mark.parametrize("order", ["time", "shuffled"])
def test_a_pass_reads_every_row_once_but_what_gives_no_batch(shards, order):
    seen = []
    for rank in range(3):
        loader = loader_of(shards, world=3, rank=rank, order=order)
        batches = rows_of(loader)
        assert (len(batches), {len(batch) for batch in batches}) == (len(loader), {64})
        seen += [row for batch in batches for row in batch]
    assert len(set(seen)) == len(seen)
    assert 0 <= shards.rows - len(seen) < 3 * (64 + 100)


def test_rows_are_mixed_within_their_window_only(shards):
    recommended = shards.select(random=False)
    rows = np.concatenate(rows_of(loader_of(recommended)))
    displacement = np.abs(rows.argsort().argsort() - np.arange(len(rows)))
    assert displacement.max() < 800
    assert np.median(displacement) > 150
    assert (np.diff(np.concatenate(rows_of(loader_of(recommended, window=0)))) > 0).all()


@pytest.mark.parametrize("stop", [0, 1, 50, 92])
def test_a_resumed_loader_gives_the_next_batch_without_reading_those_before(shards, stop):
    whole = loader_of(shards, epoch=2, order="shuffled")
    expected = rows_of(whole)
    assert len(expected) == 93
    stopped = loader_of(shards, epoch=2, order="shuffled")
    iterator = iter(stopped)
    for _ in range(stop):
        next(iterator)
    resumed = loader_of(shards, order="shuffled")
    resumed.load_state_dict(stopped.state_dict())
    assert rows_of(resumed) == expected[stop:]
    assert resumed.encoder.read <= whole.encoder.read - max(0, stop - 13) * 64
    assert rows_of(resumed) == expected  # the next pass begins at its start
    resumed.load_state_dict(whole.state_dict())  # of a complete pass
    assert rows_of(resumed) == expected


def test_a_checkpoint_of_other_ranks_or_sizes_is_refused(shards):
    state = loader_of(shards, world=2).state_dict()
    with pytest.raises(GatesError, match=r"written with 2 streams of \d+ batches, but there are 1"):
        loader_of(shards).load_state_dict(state)
    with pytest.raises(ValueError, match="the plan has 1 streams, expected 2 ranks × 1 workers"):
        StreamLoader(shards, Raw(), StreamPlan(tuple(shards.groups), 1, 8), world=2)


def test_batches_have_labels_of_their_rows(shards, feed):
    labels = feed.log["long_view"].to_numpy()
    for batch in loader_of(shards, batch_size=1_000):
        assert (batch.labels[:, 0].numpy() == labels[batch.sparse[:, 1].numpy()]).all()


def test_memory_is_bounded_by_three_windows(shards):
    plan = StreamPlan(tuple(shards.groups), 1, 64, 700)
    reader = StreamReader(shards, Raw(), plan, 0, 0)
    for number in range(plan.batches):
        reader.batch(number)
        assert len(reader._kept) <= 2
        assert sum(len(rows) for rows, _ in reader._kept.values()) <= 2 * 800


def test_evaluation_reads_all_rows_in_order(shards):
    stream = EvaluationStream(shards.select(random=False), Raw())
    batches = list(stream)
    assert len(batches) == len(stream)
    rows = np.concatenate(rows_of(batches))
    assert (np.diff(rows) > 0).all()
    assert len(rows) == shards.select(random=False).rows


def test_ranks_evaluate_different_users(shards):
    pytest.importorskip("recsys.data.datamodule")
    streams = [EvaluationStream(shards, Raw(), rank=rank, world=2) for rank in range(2)]
    batches = [list(stream) for stream in streams]
    assert len(batches[0]) == len(batches[1])
    users = [set(torch.cat([b.user for b in of_rank]).tolist()) for of_rank in batches]
    assert not users[0] & users[1]
    rows = sorted(row for of_rank in batches for batch in rows_of(of_rank) for row in batch)
    assert rows == list(range(shards.rows))


def test_damaged_and_incomplete_files_are_named(feed, tmp_path):
    shards = write_shards([feed.log[:500]], tmp_path / "s", row_group=100)
    with pytest.raises(GatesError, match=r"20220408.parquet lacks the columns row"):
        next(iter(loader_of(shards)))
    path = tmp_path / "s" / "20220408.parquet"
    content = bytearray(path.read_bytes())
    content[4:2_000] = bytes(1_996)
    path.write_bytes(content)
    with pytest.raises(GatesError, match=r"20220408.parquet is damaged"):
        shards.read(shards.groups[0])


def test_columns_are_those_that_the_schema_reads():
    assert columns_of(SCHEMA) == ["user_id", "row", "time_ms", "long_view"]
