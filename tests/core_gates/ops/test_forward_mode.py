"""Tangents through operators: by ``torch.func.jvp`` and by dual numbers."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacrev, jvp
from torch.testing import assert_close

from core_gates.ops import block_max_attention, block_sparse_attention, grouped_linear, grouped_mlp

pytestmark = [
    pytest.mark.fault("core A7"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func.jvp
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap of the Jacobian
]
COUNTS = torch.tensor([11, 0, 17])
GATHER = torch.arange(28) % 20
"""Enough rows per group to leave the path of few rows."""


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def of_linear(x):
    return grouped_linear(x, drawn(3, 8, 5), COUNTS, activation="silu", gated=True, gather=GATHER)


def of_weight(weight):
    return grouped_linear(drawn(28, 5), weight, COUNTS, bias=drawn(3, 8), activation="gelu")


def of_mlp(x):
    return grouped_mlp(x, drawn(3, 8, 5), drawn(3, 5, 4), COUNTS, gated=True, gather=GATHER)


def of_down(down):
    return grouped_mlp(drawn(28, 5), drawn(3, 4, 5), down, COUNTS, activation="gelu")


def of_queries(q):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[..., 3, 0] = False
    return block_sparse_attention(q, drawn(1, 1, 8, 4), drawn(1, 1, 8, 4), mask, 2)


def of_padded_keys(k):
    mask, padding = torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.arange(8)[None] == 2
    q, v = drawn(1, 1, 8, 4), drawn(1, 1, 8, 4)
    return block_sparse_attention(q, k, v, mask, 2, padding_mask=padding)


def of_values(v):
    return block_max_attention(drawn(1, 2, 7, 4), drawn(1, 1, 7, 4), v, 2).out


CASES = [
    (of_linear, (20, 5)),
    (of_weight, (3, 8, 5)),
    (of_mlp, (20, 5)),
    (of_down, (3, 5, 4)),
    (of_queries, (1, 1, 8, 4)),
    (of_padded_keys, (1, 1, 8, 4)),
    (of_values, (1, 1, 7, 4)),
]


def by_jvp(function, x, tangent):
    return jvp(function, (x,), (tangent,))


def by_dual_numbers(function, x, tangent):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))))


@pytest.mark.parametrize("method", [by_jvp, by_dual_numbers])
@pytest.mark.parametrize(
    ("function", "shape"), CASES, ids=lambda case: getattr(case, "__name__", "")
)
def test_tangents_are_those_of_finite_differences(function, shape, method):
    x, tangent, step = drawn(*shape), drawn(*shape) + 1, 1e-3
    value, moved = method(function, x, tangent)
    assert_close(value, function(x))
    slope = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    assert_close(moved, slope, rtol=0.02, atol=0.02)
    assert moved.abs().max() > 0.1


@pytest.mark.parametrize(
    ("function", "shape"), CASES[:4], ids=lambda case: getattr(case, "__name__", "")
)
def test_jacobians_of_both_modes_agree(function, shape):
    x, tangent = drawn(*shape), drawn(*shape) + 1
    rows = jacrev(function)(x)
    _, moved = jvp(function, (x,), (tangent,))
    assert_close(moved, (rows * tangent).flatten(2).sum(-1), rtol=1e-4, atol=1e-4)
