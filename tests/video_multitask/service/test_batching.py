import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_multitask.service.contract import Limits, RefusedError
from video_multitask.service.serving_model import Batcher, scored


@pytest.fixture
def model(toy):
    return toy.Multiplier(2.0)


@pytest.fixture
def batcher_of():
    made = []

    def build(**limits):
        seen = []
        made.append(Batcher(Limits(**limits), lambda *counts: seen.append(counts)))
        made[-1].seen = seen
        return made[-1]

    yield build
    for batcher in made:
        batcher.close()


def rows(toy, *values):
    return toy.Rows(values)


def test_waiting_requests_are_scored_at_once_in_order_by_one_thread(toy, model, batcher_of):
    batcher = batcher_of(max_wait_ms=200)
    futures = [batcher.submit(model, rows(toy, *range(n, n + 3))) for n in range(5)]
    found = [future.result(60)["y"].tolist() for future in futures]
    assert found == [[2.0 * n, 2.0 * n + 2, 2.0 * n + 4] for n in range(5)]
    assert (model.batches, batcher.seen, model.threads) == ([[3] * 5], [(5, 15)], {"scoring"})


def test_a_full_batch_does_not_wait(toy, model, batcher_of):
    batcher = batcher_of(max_wait_ms=3_600_000, max_batch_rows=6, max_batch_requests=3)
    futures = [batcher.submit(model, rows(toy, 1, 2)) for _ in range(3)]
    assert [f.result(60)["y"].tolist() for f in futures] == [[2, 4]] * 3
    assert model.batches == [[2, 2, 2]]


def test_a_single_request_waits_no_longer_than_asked(toy, model, batcher_of):
    batcher = batcher_of(max_wait_ms=30)
    begin = time.monotonic()
    batcher.submit(model, rows(toy, 1)).result(60)
    assert time.monotonic() - begin >= 0.03


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 10), st.integers(1, 5))
def test_batches_keep_the_order(toy, sizes, most_rows, most_requests):
    model = toy.Multiplier(3.0)
    limits = Limits(max_wait_ms=0, max_batch_rows=most_rows, max_batch_requests=most_requests)
    batcher = Batcher(limits)
    first = 100 + np.cumsum([0, *sizes[:-1]])
    requests = [toy.Rows(range(a, a + n)) for a, n in zip(first.tolist(), sizes, strict=True)]
    futures = [batcher.submit(model, request) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        assert future.result(60)["y"].tolist() == [3.0 * x for x in request]
    batcher.close()


def test_limits_of_batches_hold(toy, batcher_of):
    model = toy.Multiplier(1.0, pause=0.05)
    batcher = batcher_of(max_wait_ms=0, max_batch_rows=7, max_batch_requests=4)
    futures = [batcher.submit(model, rows(toy, *[0] * n)) for n in [1, 2, 2, 2, 9, 1, 1, 1, 1, 1]]
    for future in futures:
        future.result(60)
    assert [n for batch in model.batches for n in batch] == [1, 2, 2, 2, 9, 1, 1, 1, 1, 1]
    assert [9] in model.batches  # longer than a batch: scored alone
    assert all(sum(b) <= 7 or len(b) == 1 for b in model.batches)
    assert max(map(len, model.batches)) == 4


def test_a_request_that_fails_fails_alone(toy, model, batcher_of):
    batcher = batcher_of(max_wait_ms=100)
    futures = [batcher.submit(model, rows(toy, x)) for x in (1, 13, 2)]
    assert (futures[0].result(60)["y"], futures[2].result(60)["y"]) == ([2], [4])
    with pytest.raises(RuntimeError, match="cannot stand 13"):
        futures[1].result(60)
    assert batcher.alive


def test_each_request_is_scored_by_the_model_that_read_it(toy, batcher_of):
    old, new = toy.Multiplier(2.0, pause=0.02), toy.Multiplier(5.0)
    batcher = batcher_of(max_wait_ms=20)
    futures = [batcher.submit(model, rows(toy, 1)) for model in (old, old, new, new, old)]
    assert [f.result(60)["y"][0] for f in futures] == [2, 2, 5, 5, 2]
    assert [len(b) for b in new.batches] == [2]


def test_a_full_queue_refuses_and_recovers(toy, batcher_of):
    model = toy.Multiplier(1.0, pause=0.1)
    batcher = batcher_of(max_wait_ms=0, max_queue=2)
    first = batcher.submit(model, rows(toy, 1))
    while len(batcher):
        time.sleep(0.001)
    futures = [batcher.submit(model, rows(toy, 1)) for _ in range(2)]
    with pytest.raises(RefusedError, match="2 requests are waiting") as caught:
        batcher.submit(model, rows(toy, 1))
    assert caught.value.status == 429
    for future in (first, *futures):
        future.result(60)
    assert batcher.submit(model, rows(toy, 1)).result(60)["y"] == [1]


def test_a_request_given_up_is_not_scored(toy, batcher_of):
    model = toy.Multiplier(1.0, pause=0.1)
    batcher = batcher_of(max_wait_ms=0)
    first = batcher.submit(model, rows(toy, 1))
    while len(batcher):
        time.sleep(0.001)
    left, kept = batcher.submit(model, rows(toy, 2)), batcher.submit(model, rows(toy, 3))
    assert left.cancel()
    assert (kept.result(60)["y"], first.result(60)["y"], model.batches) == ([3], [1], [[1], [1]])


def test_closing_scores_what_waits_and_refuses_what_comes(toy, batcher_of):
    model = toy.Multiplier(1.0, pause=0.05)
    batcher = batcher_of(max_wait_ms=10_000)
    futures = [batcher.submit(model, rows(toy, x)) for x in range(3)]
    batcher.close()
    assert [f.result(0)["y"][0] for f in futures] == [0, 1, 2]
    assert not batcher.alive
    with pytest.raises(RefusedError, match="shutting down") as caught:
        batcher.submit(model, rows(toy, 1))
    assert caught.value.status == 503


def test_a_model_that_loses_rows_is_found_out(toy):
    class Short(toy.Multiplier):
        def score(self, requests):
            return {"y": super().score(requests)["y"][:-1]}

    with pytest.raises(ValueError, match="returned 2 rows for 3"):
        scored(Short(1.0), [rows(toy, 1, 2), rows(toy, 3)])


@pytest.mark.parametrize(
    "wrong", [{"max_rows": 0}, {"max_queue": 0}, {"timeout_s": 0}, {"max_wait_ms": -1}]
)
def test_limits_that_let_nothing_pass_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)
