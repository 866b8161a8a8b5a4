import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates.numerics import linear_fp32, lowest_index_top_k

SCORES = st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 0.5000001, 2.0])


@given(st.lists(SCORES, min_size=1, max_size=9), st.data())
def test_top_k_is_a_stable_sort(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    values, indices = lowest_index_top_k(torch.tensor(scores), k)
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert indices.tolist() == expected
    assert_close(values, torch.tensor(scores)[expected], rtol=0, atol=0)


def test_top_k_gives_distinct_indices_with_nan():
    _, indices = lowest_index_top_k(torch.tensor([[0.0, torch.nan, 1.0, torch.nan]]), 3)
    assert indices.tolist() == [[1, 3, 2]]


@pytest.mark.fault("core F8")
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_second_scores_order_equal_ones(seed, k):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 3, (4, 6), generator=generator).float()
    second = torch.randint(-2, 3, (4, 6), generator=generator) * torch.inf  # also NaN: 0 · inf
    second = second.nan_to_num(0.0, torch.inf, -torch.inf)
    values, indices = lowest_index_top_k(first, k, ties=second)
    for row, found in enumerate(indices.tolist()):
        pairs = list(zip(first[row].tolist(), second[row].tolist(), strict=True))
        best = sorted(range(6), key=lambda e: (-pairs[e][0], -pairs[e][1], e))[:k]
        assert sorted(pairs[e] for e in found) == sorted(pairs[e] for e in best)
        assert len(set(found)) == k
    assert torch.equal(values, first.gather(-1, indices))
    assert (values.diff(dim=-1) <= 0).all()


@pytest.mark.fault("core F8")
def test_second_scores_do_not_hide_a_nan():
    first = torch.tensor([0.0, torch.nan, 2.0, torch.nan])
    _, indices = lowest_index_top_k(first, 3, ties=first)
    assert set(indices.tolist()) == {1, 2, 3}


def test_top_k_passes_gradients_to_the_chosen_scores():
    scores = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    values, _ = lowest_index_top_k(scores, 2)
    (values * torch.tensor([10.0, 20.0])).sum().backward()
    assert scores.grad.tolist() == [[10.0, 0.0, 20.0]]


def test_logits_are_float32_under_autocast_and_exact():
    x, weight = torch.full((1, 2), 1 + 2**-9), torch.ones(1, 2)  # bfloat16 would round 2^-9 off
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = linear_fp32(x, weight)
        assert torch.is_autocast_enabled("cpu")
    assert (logits.dtype, logits.item()) == (torch.float32, 2 + 2**-8)


def test_half_precision_operands_are_raised():
    x, weight = torch.full((1, 300), 0.1).bfloat16(), torch.ones(2, 300).bfloat16()
    bias = torch.tensor([1.0, 2.0]).bfloat16()
    logits = linear_fp32(x, weight, bias)
    assert_close(logits, x.float().sum() + bias.float().unsqueeze(0))
    assert linear_fp32(x.double(), weight).dtype == torch.float64


def test_ignored_positions_that_are_not_finite_leave_the_weight_gradient_alone():
    x = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [3.0, 4.0]])
    mask = torch.tensor([False, True, False])
    weight = torch.ones(2, 2, requires_grad=True)
    logits = linear_fp32(x, weight, padding_mask=mask)
    logits.sum().backward()
    assert logits.tolist() == [[3.0, 3.0], [0.0, 0.0], [7.0, 7.0]]
    assert weight.grad.tolist() == [[4.0, 6.0], [4.0, 6.0]]


def test_finite_ignored_positions_keep_their_score():
    x = torch.tensor([[1.0, 2.0]])
    assert linear_fp32(x, torch.ones(1, 2), padding_mask=torch.tensor([True])).item() == 3.0


def test_feature_count_and_mask_are_checked(refuses):
    x, weight = torch.zeros(4, 3), torch.zeros(5, 3)
    refuses(
        ValueError,
        (r"x \(4, 3\) must end in the 6 features", lambda: linear_fp32(x, torch.zeros(5, 6))),
        (
            r"True = ignore, got torch\.int64; convert .* == 0",
            lambda: linear_fp32(x, weight, padding_mask=torch.ones(4, dtype=torch.int64)),
        ),
        (
            r"padding_mask \(1,\) must have the shape \(4,\)",
            lambda: linear_fp32(x, weight, padding_mask=torch.ones(1, dtype=torch.bool)),
        ),
    )
