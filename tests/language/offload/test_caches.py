"""Policies and slots: golden vectors, Belady's bound, room for what must stay."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_gates.errors import GatesError
from language.offload.allocation import ALLOCATIONS, allocate
from language.offload.caches import POLICIES, make_cache

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora"
TRACES = st.lists(st.integers(0, 7), min_size=1, max_size=60)


@pytest.fixture(params=["fate_small", "fate_wide"])
def golden(request):
    with np.load(GOLDEN / f"{request.param}.npz") as arrays:
        yield arrays


def replay(cache, trace):
    return [cache.use(expert).hit for expert in trace]


def slots_of(golden, how):
    layers, experts, least = (int(golden[name]) for name in ("L", "E", "top_k"))
    budget = int(golden["budget"])
    return allocate(how, budget, layers=layers, experts=experts, least=least)


@pytest.mark.parametrize("how", ALLOCATIONS)
def test_golden_allocations(golden, how):
    assert slots_of(golden, how) == golden[f"alloc_{how}"].tolist()


@pytest.mark.parametrize("how", ALLOCATIONS)
@pytest.mark.parametrize("policy", ["LRU", "LFU", "LIFO", "ARC"])
def test_golden_hits_and_what_stays(golden, policy, how):
    hits, final = golden[f"hit_{policy}_{how}"], golden[f"final_{policy}_{how}"]
    for layer, slots in enumerate(slots_of(golden, how)):
        cache = make_cache(policy.lower(), slots)
        found = replay(cache, golden["actual_topk"][layer].ravel().tolist())
        assert found == hits[:, layer].ravel().tolist()
        assert sorted(cache.resident) == final[layer].nonzero()[0].tolist()


@given(
    budget=st.integers(0, 60),
    layers=st.integers(1, 6),
    experts=st.integers(2, 9),
    least=st.integers(1, 2),
)
@pytest.mark.parametrize("how", ALLOCATIONS)
def test_slots_use_the_budget_and_every_layer_has_its_least(how, budget, layers, experts, least):
    budget += layers * least
    slots = allocate(how, budget, layers=layers, experts=experts, least=least)
    assert sum(slots) == min(budget, layers * experts)
    assert all(least <= some <= experts for some in slots)
    assert slots == sorted(slots, reverse=True)


@settings(max_examples=40)
@given(trace=TRACES, capacity=st.integers(1, 8))
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_hits_more_often_than_belady_and_none_overflows(policy, trace, capacity):
    cache = make_cache(policy, capacity, trace)
    hits = 0
    for expert in trace:
        before = set(cache.resident)
        use = cache.use(expert)
        hits += use.hit
        assert use.hit == (expert in before)
        assert set(cache.resident) == (before - {use.evicted}) | {expert}
        assert len(cache.resident) <= capacity
        assert use.evicted is None or len(before) == capacity
    assert hits <= sum(replay(make_cache("belady", capacity, trace), trace))


@settings(max_examples=40)
@given(trace=TRACES, capacity=st.integers(1, 4), gone=st.sets(st.integers(0, 59)))
@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"belady"}))
def test_what_is_in_use_stays_and_what_could_not_be_read_is_dropped(policy, trace, capacity, gone):
    cache = make_cache(policy, capacity, trace)
    for start in range(0, len(trace), capacity):
        portion = sorted(set(trace[start : start + capacity]))
        for expert in portion:
            assert cache.use(expert, portion).evicted not in portion
        assert set(portion) <= set(cache.resident)
        if start in gone:
            cache.drop(portion[0])
            assert portion[0] not in cache.resident
            assert not cache.use(portion[0], portion).hit


def test_bad_inputs_are_one_line(refuses):
    refuses(
        GatesError,
        ("policy is 'fifo'; choose one of lru, ", lambda: make_cache("fifo", 2)),
        ("policy 'static' needs a trace", lambda: make_cache("static", 2)),
        ("use 1 is of expert 5", lambda: replay(make_cache("belady", 2, [4, 6]), [4, 5])),
        ("allocation is 'deep'", lambda: allocate("deep", 9, layers=2, experts=4, least=2)),
    )
