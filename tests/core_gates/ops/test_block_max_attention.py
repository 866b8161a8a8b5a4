import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.block_max_attention import op, reference
from core_gates.ops.block_max_attention.op import block_max_attention

OP = torch.ops.core_gates.block_max_attention.default
SCALE = 0.3
CASES = [(32, 8), (29, 8), (1, 16), (40, 20), (7, 3), (5, 20)]  # length, block size


def case(length, dtype=torch.float64, *, dim=5, sizes=(2, 4), seed=0):
    """Random inputs of a batch and heads, two of them for each key head."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads = sizes
    shapes = (heads, heads // 2, heads // 2)
    return tuple(
        torch.randn(batch, h, length, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for h in shapes
    )


def by_hand(q, k, size, per_row):
    """Take the maxima of the map of weights, block by block."""
    length = q.shape[2]
    num_blocks = math.ceil(length / size)
    scores = q @ k.repeat_interleave(2, 1).mT * SCALE
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    rows = length if per_row else num_blocks
    maxima = torch.zeros(*q.shape[:2], rows, num_blocks, dtype=q.dtype)
    for i in range(rows):
        part = weights[:, :, i : i + 1] if per_row else weights[:, :, i * size : (i + 1) * size]
        for j in range(num_blocks):
            maxima[:, :, i, j] = part[..., j * size : (j + 1) * size].amax((-2, -1))
    return maxima


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_output_and_maxima(shape, per_row):
    length, size = shape
    q, k, v = (t.detach() for t in case(length))
    maxima = by_hand(q, k, size, per_row)
    expected = scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True, scale=SCALE
    )
    for found in (
        block_max_attention(q, k, v, size, scale=SCALE, per_row=per_row),
        reference.forward(q, k, v, size, SCALE, per_row),
    ):
        out, lse, block_max = found
        assert_close(out, expected)
        assert_close(block_max, maxima, rtol=0, atol=1e-12)
        first = (q[:, :, 0] * k.repeat_interleave(2, 1)[:, :, 0]).sum(-1) * SCALE
        assert_close(lse[:, :, 0], first)
    assert_close(lse, block_max_attention(q, k, v, size, scale=SCALE).lse)


@pytest.mark.parametrize("rows", [1, 8, 24, 10**6])
def test_the_size_of_a_chunk_changes_nothing(rows, monkeypatch):
    q, k, v = (t.detach() for t in case(45))
    monkeypatch.setattr(op, "ROWS", rows)
    for per_row in (False, True):
        arguments = (q, k, v, 8, SCALE, per_row)
        assert_close(op.forward(*arguments), reference.forward(*arguments))


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = (t.detach() * 60 for t in case(29, torch.float32))
    out, lse, maxima = block_max_attention(q, k, v, 8)
    exact = reference.forward(q.double(), k.double(), v.double(), 8, 5**-0.5, False)
    assert lse.abs().max() > 1000
    assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-3)
    assert_close(maxima.double(), exact[2], rtol=1e-3, atol=1e-4)
    assert out.isfinite().all()


def test_half_precision_keeps_float32_maxima():
    q, k, v = (t.detach() for t in case(32, torch.bfloat16))
    out, lse, maxima = block_max_attention(q, k, v, 8)
    exact = reference.forward(q.float(), k.float(), v.float(), 8, 5**-0.5, False)
    assert (out.dtype, lse.dtype, maxima.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_close((lse, maxima), exact[1:])
    assert_close(out, exact[0].bfloat16(), rtol=1e-2, atol=1e-3)


def test_gradients_are_those_of_attention():
    q, k, v = case(6, dim=2, sizes=(1, 2))
    assert gradcheck(lambda q, k, v: block_max_attention(q, k, v, 4, scale=1.3).out, (q, k, v))
    result = block_max_attention(q, k, v, 4)
    assert not result.lse.requires_grad
    assert not result.block_max.requires_grad


def test_long_gradients_are_those_of_attention():
    q, k, v = case(150, sizes=(1, 2))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).double()
    plain = scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    out = block_max_attention(q, k, v, 8).out
    inputs = (q, k, v)
    assert_close(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(plain, inputs, grad))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.ends("shapes are registered alike")
def test_registration(per_row):
    opcheck(OP, (*case(13, sizes=(1, 2)), 8, SCALE, per_row, "row_chunks"))


def test_one_graph():
    q, k, v = case(13)
    compiled = torch.compile(block_max_attention, backend="eager", fullgraph=True)
    assert_close(tuple(compiled(q, k, v, 8)), tuple(block_max_attention(q, k, v, 8)))


def test_wrong_arguments_are_named(refuses):
    q, k, v = case(8)
    refuses(
        ValueError,
        ("where K divides H", lambda: block_max_attention(q[:, :3], k, v, 8)),
        (r"k \(2, 2, 7, 5\)", lambda: block_max_attention(q, k[:, :, 1:], v[:, :, 1:], 8)),
        ("block_size must be at least 1, got 0", lambda: block_max_attention(q, k, v, 0)),
    )


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.block_max_attention import kernel

    return kernel


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in CASES),
        (CASES[1], torch.float16),
        (CASES[1], torch.bfloat16),
    ],
    ids=str,
)
def test_kernel_matches_definition(shape, dtype, per_row, kernel, kernel_device, poisoned_empty):
    length, size = shape
    q, k, v = (t.detach().to(kernel_device) for t in case(length, dtype, sizes=(1, 2)))
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    before = q.clone(), k.clone(), v.clone()
    found = kernel.forward(q, k, v, size, SCALE, per_row)
    exact = reference.forward(q.float(), k.float(), v.float(), size, SCALE, per_row)
    half = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    assert_close(found[0], exact[0].to(dtype), **half)
    assert_close(found[1:], exact[1:], rtol=1e-5, atol=1e-6)
    assert_close((q, k, v), before, rtol=0, atol=0)


@pytest.mark.gpu
def test_triton_mode_on_cuda():
    q, k, v = (t.detach().cuda() for t in case(200, torch.float32, dim=64))
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            results[mode] = tuple(block_max_attention(q, k, v, 64))
    assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-5)
