import math
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_gates import RoutingOutput
from core_gates.routing.capacity import (
    capacity,
    group_capacity,
    limit_capacity,
    positions_in_expert,
)


@pytest.mark.parametrize(
    ("rule", "factor", "expected"),
    [
        ("ceil", 1.25, 5),
        ("ceil", 1.0, 4),
        ("ceil", 0.01, 1),
        ("floor", 1.25, 4),
        ("per_expert", 1.25, 5),
        ("per_expert", 2.0, 8),
        ("per_token", 0.25, 6),
    ],
)
def test_rules_at_23_tokens_and_6_experts(rule, factor, expected):
    assert capacity(23, 6, factor, rule) == expected


def test_capacity_of_golden_vectors(golden):
    assert capacity(24, 6, 1.25) == golden("standard_T24_E6_k2")["switch_capacity"] == 5
    assert capacity(24, 6, 2.0) == golden("standard_T24_E6_k2")["expert_choice_capacity"] == 8


def test_capacity_is_at_least_one_and_not_raised_by_rounding():
    assert capacity(0, 4, 1.0) == capacity(1, 64, 1.0) == 1
    assert 1.1 * 100 / 10 > 11
    assert capacity(100, 10, 1.1) == 11
    assert 0.07 * 100 > 7
    assert capacity(100, 10, 0.07, "per_token") == 7
    assert 0.29 * 100 < 29
    assert capacity(100, 1, 0.29, "floor") == 29


@pytest.mark.fault("core A12")
@pytest.mark.parametrize("rule", ["ceil", "floor", "per_expert", "per_token"])
def test_capacity_where_the_device_has_no_float64(rule, monkeypatch):
    module = import_module("core_gates.routing.capacity")
    monkeypatch.setattr(module, "widest_float", lambda _device: torch.float32)
    numbers = [1, 2, 7, 23, 100, 4095, 4096, 100_000]
    for factor in (0.07, 0.25, 0.29, 1.0, 1.1, 1.25, 2.0):
        for experts in (1, 6, 10, 64):
            for number in numbers:
                real = torch.zeros(2, 100_000, 1, dtype=torch.bool)
                real[1, :number] = True
                limit = group_capacity(100_000, experts, factor, rule, real, torch.device("cpu"))
                assert limit.dtype == torch.float32
                expected = [[[capacity(n, experts, factor, rule)]] for n in (0, number)]
                assert limit.tolist() == expected


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_factor_is_checked(refuses, factor):
    refuses(ValueError, ("capacity_factor must be positive", lambda: capacity(4, 2, factor)))


def test_rule_is_checked():
    with pytest.raises(ValueError, match="capacity_rule is 'round'; choose one of ceil, floor"):
        capacity(4, 2, 1.0, "round")


def places_by_loop(indices, counted, order):
    """Queue one by one: all first choices, then all second choices."""
    places, filled = torch.full_like(indices, -1), {}
    for choice in range(indices.shape[1]):
        for token in order:
            if counted[token, choice]:
                expert = int(indices[token, choice])
                places[token, choice] = filled.get(expert, 0)
                filled[expert] = filled.get(expert, 0) + 1
    return places


@given(
    st.integers(0, 12), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(0, 1000)
)
def test_places_are_those_of_queueing_one_by_one(tokens, experts, choices, prioritized, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(experts, (2, tokens, choices), generator=generator)
    counted = torch.rand(indices.shape, generator=generator) < 0.7
    scores = torch.randint(4, (2, tokens), generator=generator).float()  # with ties
    priority = scores if prioritized else None
    places = positions_in_expert(indices, experts, counted=counted, priority=priority)
    for group in range(2):
        order = sorted(range(tokens), key=lambda t: -scores[group, t] if prioritized else 0)
        expected = places_by_loop(indices[group], counted[group], order)
        assert torch.equal(places[group].masked_fill(~counted[group], -1), expected)


def routing_of(indices, num_experts=3, kept=None):
    weights = torch.ones(indices.shape)
    probs = torch.full((*indices.shape[:-1], num_experts), 1 / num_experts)
    return RoutingOutput(weights, indices, kept, probs=probs)


def test_groups_have_their_own_queues_along_any_dimension():
    indices = torch.zeros(2, 3, 1, dtype=torch.int64)
    kept = {
        dim: limit_capacity(routing_of(indices), 1.0, group_dim=dim).kept[..., 0].tolist()
        for dim in (None, 0, 1, -2)
    }
    assert (kept[None], kept[0]) == ([[True, True, False], [False] * 3], [[True] * 3, [False] * 3])
    assert kept[1] == kept[-2] == [[True, False, False], [True, False, False]]


def test_dropped_choices_and_padding_take_no_place():
    mask = torch.tensor([True, False, False, False])
    routing = routing_of(torch.zeros(4, 1, dtype=torch.int64)).ignore(mask)
    kept = limit_capacity(routing, 1.0, padding_mask=mask).kept
    assert kept[:, 0].tolist() == [False, True, False, False]  # 3 tokens: capacity 1
    kept = limit_capacity(routing, 1.0, padding_mask=mask, padding_in_capacity=True).kept
    assert kept[:, 0].tolist() == [False, True, True, False]  # 4 tokens: capacity 2


@pytest.mark.parametrize("rule", ["ceil", "floor", "per_expert", "per_token"])
@pytest.mark.parametrize("real", [0, 1, 5, 30, 100])
def test_capacity_under_a_mask_is_that_of_the_real_tokens(rule, real):
    mask = torch.arange(100) >= real
    routing = routing_of(torch.zeros(100, 1, dtype=torch.int64), 10).ignore(mask)
    kept = limit_capacity(routing, 1.1, rule=rule, padding_mask=mask).kept
    assert kept.sum() == min(real, capacity(real, 10, 1.1, rule))


def test_no_factor_drops_nothing():
    routing = routing_of(torch.zeros(9, 1, dtype=torch.int64))
    assert limit_capacity(routing, None) is routing


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="only a routing with indices has a capacity"):
        limit_capacity(RoutingOutput(torch.ones(2, 3)), 1.0)
    routing = routing_of(torch.zeros(2, 2, 1, dtype=torch.int64))
    for dim in (2, -1, 3, -4):
        with pytest.raises(ValueError, match="group_dim must be a dimension of the 2 before"):
            limit_capacity(routing, 1.0, group_dim=dim)
    with pytest.raises(ValueError, match="must have the shape"):
        limit_capacity(routing, 1.0, padding_mask=torch.zeros(3, dtype=torch.bool))
