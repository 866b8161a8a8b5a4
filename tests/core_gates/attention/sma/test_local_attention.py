import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates.attention.sma.gated_attention_unit import local_attention


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_full_scores(query, key, value, window, causal, weighting, filled):
    num_slots, key_dim = query.shape[1:]
    apart = torch.arange(num_slots) - torch.arange(num_slots).unsqueeze(-1)
    seen = (apart >= -window) & (apart <= (0 if causal else window)) & filled.unsqueeze(1)
    scores = query @ key.mT
    if weighting == "softmax":
        weights = (scores / key_dim**0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    else:
        weights = (scores / (window if causal else 2 * window)).relu().square() * seen
    return weights @ value


@given(
    st.integers(1, 11),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["softmax", "relu2"]),
    st.lists(st.booleans(), min_size=22, max_size=22),
)
def test_equals_attention_over_all_slots_with_a_band_mask(num, window, causal, weighting, filled):
    query, key, value = (random(2, num, d, seed=i) for i, d in enumerate((4, 4, 3)))
    filled = torch.tensor(filled).view(2, 11)[:, :num]
    options = {"window": window, "causal": causal, "weighting": weighting, "filled": filled}
    found = local_attention(query, key, value, **options)
    expected = by_full_scores(query, key, value, window, causal, weighting, filled)
    assert found.isfinite().all()
    assert_close(found[filled], expected[filled])


@pytest.mark.parametrize("weighting", ["softmax", "relu2"])
def test_gradients(weighting):
    query, key, value = (random(1, 5, d, seed=i).requires_grad_() for i, d in enumerate((2, 2, 3)))
    bias = random(2, 6, seed=4).requires_grad_()
    filled = torch.tensor([[True, True, False, True, True]])
    options = {"window": 2, "causal": False, "weighting": weighting, "filled": filled}
    assert gradcheck(
        lambda q, k, v, b: local_attention(q, k, v, bias=b, **options), (query, key, value, bias)
    )


def test_options_are_checked(refuses):
    x, filled = torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.bool)
    refuses(
        ValueError,
        (
            "window must be at least 1, got 0",
            lambda: local_attention(
                x, x, x, window=0, causal=True, weighting="softmax", filled=filled
            ),
        ),
        (
            "weighting is 'relu'; choose one of",
            lambda: local_attention(
                x, x, x, window=1, causal=True, weighting="relu", filled=filled
            ),
        ),
    )
