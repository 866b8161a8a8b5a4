import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from video_multitask.stream.plan import StreamPlan
from video_multitask.stream.shards import Group

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
    assert sizes[0] == sizes[1]
    assert plan.batches == min(sizes[0]) // 2
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
    unshuffled = plan_of([800], 2, "time", window=0).permutation(0, 0, w[0])
    assert unshuffled.tolist() == list(range(80))


def test_too_few_rows_are_refused():
    with pytest.raises(GatesError, match="16 rows in 2 row groups give no batch of 4 to each of 3"):
        StreamPlan(groups_of([16]), 3, 4)
    with pytest.raises(ValueError, match="order is 'random'; choose one of time, shuffled"):
        StreamPlan(groups_of([16]), 1, 4, order="random")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        StreamPlan(groups_of([16]), 1, 0)
