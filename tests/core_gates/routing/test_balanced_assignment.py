import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.testing import assert_close

from core_gates.routing.assignment import auction, balanced_assignment, solve_exactly


def scores_of(kind, num_tokens, num_experts, seed=0):
    scores = torch.randn(
        num_tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    if kind == "skewed":
        return scores + torch.linspace(-2, 2, num_experts)
    if kind == "ties":
        return scores.round()
    if kind == "equal tokens":
        return scores[:1].expand(num_tokens, -1).contiguous()
    return scores + 5 if kind == "shifted" else scores


def total(scores, experts):
    return float(scores.gather(1, experts.unsqueeze(1)).sum())


def assert_balanced(experts, num_tokens, num_experts):
    load = torch.bincount(experts, minlength=num_experts)
    assert load.sum() == num_tokens
    assert load.max() <= math.ceil(num_tokens / num_experts)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(6, 2), (6, 3), (5, 3), (2, 4)])
def test_exact_solution_is_the_best_of_all(num_tokens, num_experts):
    scores = scores_of("plain", num_tokens, num_experts)
    best = max(
        sum(float(scores[t, e]) for t, e in enumerate(experts))
        for experts in itertools.product(range(num_experts), repeat=num_tokens)
        if max(map(experts.count, experts)) <= math.ceil(num_tokens / num_experts)
    )
    experts = solve_exactly(scores)
    assert_balanced(experts, num_tokens, num_experts)
    assert total(scores, experts) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("name", ["standard_T24_E6_k2", "standard_T32_E8_k3"])
@pytest.mark.parametrize("exact_up_to", [1024, 0])
def test_golden_total(golden, name, exact_up_to):
    g = golden(name)
    experts = balanced_assignment(g["logits"][None], exact_up_to=exact_up_to)[0]
    best = float(g["base_total"])
    tolerance = 1e-10 if exact_up_to else 1e-3 * best
    assert total(g["logits"], experts) == pytest.approx(best, abs=tolerance)
    assert total(g["logits"], g["base_assignment"]) == pytest.approx(best, abs=1e-10)


@pytest.mark.parametrize("kind", ["plain", "skewed", "ties", "equal tokens", "shifted"])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(320, 8), (301, 7), (64, 32)])
def test_auction_comes_within_a_thousandth(kind, num_tokens, num_experts):
    scores = scores_of(kind, num_tokens, num_experts)
    experts = auction(scores)
    assert_balanced(experts, num_tokens, num_experts)
    best = total(scores, solve_exactly(scores))
    at_random = float(scores.mean(1).sum())
    found = total(scores, experts)
    assert best - found <= 1e-3 * min(abs(best), best - at_random) + 1e-9


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 99), st.floats(1e-3, 1e3))
def test_auction_ends_balanced_whatever_the_scale(num_tokens, num_experts, seed, scale):
    scores = scores_of("plain", num_tokens, num_experts, seed)
    experts = auction(scale * scores)
    assert_balanced(experts, num_tokens, num_experts)
    assert torch.equal(experts, auction(scale * scores))  # the same every time


def test_groups_and_uncounted_tokens():
    scores = torch.stack([scores_of("plain", 6, 3, seed) for seed in range(2)])
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, [1, 4, 5]] = False
    counted[1] = False
    experts = balanced_assignment(scores, counted)
    assert torch.equal(experts[0, counted[0]], solve_exactly(scores[0, counted[0]]))
    assert sorted(experts[0, counted[0]].tolist()) == [0, 1, 2]
    assert balanced_assignment(scores[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("exact_up_to", [1024, 0])
def test_values_that_are_not_finite_do_not_stop_it(exact_up_to):
    scores = scores_of("plain", 8, 2)
    scores[0], scores[1, 0], scores[2, 1] = torch.nan, torch.inf, -torch.inf
    experts = balanced_assignment(scores[None], exact_up_to=exact_up_to)[0]
    assert_balanced(experts, 8, 2)
    assert experts[1:3].tolist() == [0, 0]


def test_registration():
    scores = scores_of("plain", 6, 3)[None]
    counted = torch.ones(1, 6, dtype=torch.bool)
    opcheck(torch.ops.core_gates.balanced_assignment.default, (scores, counted, 4))
    assert_close(balanced_assignment(scores.float(), counted), balanced_assignment(scores, counted))
