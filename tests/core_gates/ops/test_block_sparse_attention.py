import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from core_gates import kernels
from core_gates.ops import BlockLayout, block_sparse_attention
from core_gates.ops.block_sparse_attention import gather, reference, rows

OP = torch.ops.core_gates.block_sparse_attention.default
SCALE = 0.3
# Lq, Lk, block size, causal
CASES = [
    (32, 32, 8, True),
    (29, 29, 8, True),
    (13, 30, 8, True),  # the queries begin in the middle of a block
    (1, 17, 16, True),
    (29, 21, 8, False),
    (16, 32, 16, False),
    (7, 7, 3, True),
    (5, 5, 20, True),
]


def case(
    num_queries,
    num_keys,
    size,
    causal,
    *,
    share=0.5,
    dtype=torch.float64,
    seed=0,
    dim=5,
    sizes=(2, 4),
):
    """Random inputs and mask of a batch and heads, two of them for each key head."""
    batch, heads = sizes
    generator = torch.Generator().manual_seed(seed)

    def randn(heads, length):
        return torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)

    layout = BlockLayout(size, num_queries, num_keys, causal)
    grid = (batch, heads, layout.num_query_blocks, layout.num_key_blocks)
    mask = torch.rand(grid, generator=generator) < share
    q, k, v = (
        randn(heads, num_queries),
        randn(heads // 2, num_keys),
        randn(heads // 2, num_keys),
    )
    return (*(t.to(dtype).requires_grad_() for t in (q, k, v)), mask)


def padding_of(num_keys, batch=2):
    """Padding before the tokens of one sequence, and after and between those of another."""
    padding = torch.zeros(batch, num_keys, dtype=torch.bool)
    padding[0, : num_keys // 3] = padding[-1, num_keys // 4] = padding[-1, -(num_keys // 5) :] = (
        True
    )
    return padding


def filled_padding(tensors, padding, causal, content=torch.nan):
    """Return q, k and v that hold ``content`` at padding."""
    q, k, v = tensors
    hidden = padding[:, None, :, None]
    first = k.shape[2] - q.shape[2]
    q = q.masked_fill(hidden[:, :, first:], content) if causal else q
    return q, k.masked_fill(hidden, content), v.masked_fill(hidden, content)


def by_hand(q, k, v, mask, size, causal, padding=None):
    """Attend query by query, key by key; queries at padding are zero under causality."""
    out = torch.zeros_like(q)
    offset = k.shape[2] - q.shape[2] if causal else 0
    first_block = offset // size
    for batch, head, i in itertools.product(*map(range, q.shape[:3])):
        row = (offset + i) // size - first_block
        seen = [
            j
            for j in range(k.shape[2])
            if mask[batch, head, row, j // size] and not (causal and j > offset + i)
            if padding is None or not padding[batch, j]
        ]
        if seen and not (causal and padding is not None and padding[batch, offset + i]):
            scores = k[batch, head // 2, seen] @ q[batch, head, i] * SCALE
            out[batch, head, i] = scores.softmax(0) @ v[batch, head // 2, seen]
    return out


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_only_kept_visible_keys_are_attended(shape):
    q, k, v, mask = case(*shape, sizes=(1, 4))
    size, causal = shape[2:]
    expected = by_hand(*(t.detach() for t in (q, k, v)), mask, size, causal)
    out, lse = reference.forward(q, k, v, mask, size, causal, SCALE)
    assert_close(out, expected)
    assert torch.equal(lse == -torch.inf, (expected == 0).all(-1))
    found = block_sparse_attention(q, k, v, mask, size, causal=causal, scale=SCALE)
    assert_close(found, expected)
    assert not (found.detach().abs().sum((0, 1, 3)) == 0).all()


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("share", [0.2, 0.8, 1.0])
def test_gradients_are_those_of_the_definition(shape, share):
    q, k, v, mask = case(*shape, share=share)
    size, causal = shape[2:]
    definition = reference.forward(q, k, v, mask, size, causal, SCALE)[0]
    grad = torch.randn(definition.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.autograd.grad(definition, (q, k, v), grad)
    found = OP(q, k, v, mask, size, causal, SCALE, "gather")[0]
    assert_close(torch.autograd.grad(found, (q, k, v), grad), expected)
    public = block_sparse_attention(q, k, v, mask, size, causal=causal, scale=SCALE)
    assert_close(torch.autograd.grad(public, (q, k, v), grad), expected)


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("content", [torch.nan, -torch.inf])
def test_padding_gets_no_weight_whatever_it_holds(shape, content):
    *qkv, mask = case(*shape, share=0.8)
    size, causal = shape[2:]
    padding = padding_of(shape[1])
    plain = [t.detach() for t in qkv]
    leaves = [t.requires_grad_() for t in filled_padding(plain, padding, causal, content)]
    options = {"causal": causal, "scale": SCALE, "padding_mask": padding}
    out = block_sparse_attention(*leaves, mask, size, **options)
    assert_close(out, by_hand(*plain, mask, size, causal, padding))
    shown = ~padding[:, None, -shape[0] :, None] if causal else torch.tensor(True)
    definition = reference.forward(*qkv, mask, size, causal, SCALE, padding)[0] * shown
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad(out, leaves, grad)
    assert_close(found, torch.autograd.grad(definition, qkv, grad))


@pytest.mark.parametrize("dense_above", [0.5, 1.0])
def test_a_padded_sequence_is_the_sequence_alone(dense_above):
    """All kept: padding in front shifts the blocks, which then changes nothing."""
    q, k, v, mask = (t.detach() for t in case(40, 40, 8, True))
    full, padding = torch.ones_like(mask), torch.zeros(2, 40, dtype=torch.bool)
    padding[0, :11] = padding[1, 37:] = True
    out = block_sparse_attention(q, k, v, full, 8, padding_mask=padding, dense_above=dense_above)
    for row, tokens in enumerate((slice(11, 40), slice(0, 37))):
        alone = [t[row : row + 1, :, tokens] for t in (q, k, v)]
        expected = scaled_dot_product_attention(
            *(alone[0], *(t.repeat_interleave(2, 1) for t in alone[1:])), is_causal=True
        )
        assert_close(out[row : row + 1, :, tokens], expected)
    assert (block_sparse_attention(q, k, v, full, 8) - out)[
        0, :, 11:
    ].abs().max() > 0.1  # what padding did to tokens
    assert not out[0, :, :11].any()


@pytest.mark.parametrize("limit", [1, 300, 2**17])
def test_the_size_of_a_group_changes_nothing(limit, monkeypatch):
    q, k, v, mask = (t.detach() for t in case(32, 32, 8, True))
    expected = reference.forward(q, k, v, mask, 8, True, SCALE)[0]
    monkeypatch.setattr(gather, "CPU_SCORES", limit)
    layout = BlockLayout(8, 32, 32, True)
    found = list(gather.groups(mask, layout, 2, limit))
    assert sum(len(g.rows) for g in found) == (mask & layout.reachable("cpu")).any(-1).sum()
    assert sum(len(g.blocks) for g in found) == (mask & layout.reachable("cpu")).sum()
    assert all(len(g.blocks) * 64 <= limit or len(g.rows) == 1 for g in found)
    assert (max(len(g.rows) for g in found) > 1) == (limit > 1)
    assert_close(gather.forward(q, k, v, mask, 8, True, SCALE), expected)


SHORT = [
    (1, 37, 8, True),
    (7, 37, 8, True),  # in two blocks
    (8, 8, 8, True),
    (3, 29, 8, False),
    (5, 20, 20, True),
]


@pytest.mark.parametrize("shape", SHORT, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("picked", [1, 35, rows.PICKED])
def test_few_queries_pick_the_kept_keys(shape, padded, picked, monkeypatch):
    monkeypatch.setattr(rows, "PICKED", picked)
    q, k, v, mask = (t.detach() for t in case(*shape))
    mask[1, :2] = False  # a key head without any key
    padding = padding_of(shape[1]) if padded else None
    settings = (mask, *shape[2:], SCALE, padding)
    expected = reference.forward(q, k, v, *settings)[0]
    assert (expected[1, :2] == 0).all()
    if padded:
        q, k, v = (q, *filled_padding((q, k, v), padding, shape[3])[1:])
    room = (torch.nn.functional.pad(t, (0, 2, 3, 10), value=torch.nan) for t in (k, v))
    k, v = (whole[:, :, 3 : 3 + shape[1], :5] for whole in room)  # views into a larger memory
    assert_close(rows.forward(q, k, v, *settings), expected)
    half = (t.bfloat16() for t in (q, k, v))
    assert_close(rows.forward(*half, *settings).double(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("num_queries", "share"), [(1, 0.1), (1, 1.0), (3, 0.1), (3, 1.0)])
def test_few_queries_neither_copy_nor_repeat_the_cache(num_queries, share, monkeypatch, largest):
    monkeypatch.setattr(rows, "PICKED", 2**12)
    shape = (num_queries, 2047, 16, True)
    q, k, v, mask = case(*shape, share=share, dtype=torch.float32, dim=64, sizes=(1, 8))
    q, k, v = (t.detach() for t in (q, k, v))
    expected = reference.forward(q, k, v, mask, 16, True, SCALE)[0]
    monkeypatch.setattr(gather, "forward", None)  # an operator hides what is allocated inside
    with largest(q, k, v) as public:
        assert_close(block_sparse_attention(q, k, v, mask, 16, scale=SCALE), expected)
    with largest(q, k, v) as inside:
        assert_close(rows.forward(q, k, v, mask, 16, True, SCALE), expected)
    cache = k.numel() // k.shape[1]  # of one key head
    sizes = public.elements, inside.elements
    assert 0 < min(sizes) <= max(sizes) < cache / 4


@settings(max_examples=40)
@given(
    num_queries=st.integers(0, 12),
    more=st.integers(0, 9),
    size=st.integers(1, 6),
    causal=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_lengths_and_masks(num_queries, more, size, causal, share, seed):
    q, k, v, mask = case(num_queries, num_queries + more, size, causal, share=share, seed=seed)
    out = block_sparse_attention(q, k, v, mask, size, causal=causal)
    expected = reference.forward(q, k, v, mask, size, causal, 5**-0.5)[0]
    assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert_close(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)))


@pytest.mark.parametrize("heads", [1, 2])
def test_masks_are_shared_among_heads_and_batch(heads):
    q, k, v, mask = case(20, 20, 8, True)
    shared = mask[:1, :heads]
    full = shared.repeat_interleave(4 // heads, 1).expand_as(mask)
    found = block_sparse_attention(q, k, v, shared, 8)
    assert_close(found, reference.forward(q, k, v, full, 8, True, 5**-0.5)[0])


def test_dense_above_counts_the_reachable_blocks():
    q, k, v, mask = case(32, 32, 8, True)
    mask = torch.ones_like(mask)
    mask[..., 3, 0] = False  # nine of ten
    exact = reference.forward(q, k, v, mask, 8, True, 5**-0.5)[0]
    dense = reference.forward(q, k, v, torch.ones_like(mask), 8, True, 5**-0.5)[0]
    assert (exact - dense).abs().max() > 1e-2
    assert_close(block_sparse_attention(q, k, v, mask, 8, dense_above=0.91), exact)
    assert_close(block_sparse_attention(q, k, v, mask, 8, dense_above=0.89), dense)


def test_half_precision_is_computed_in_float32():
    q, k, v, mask = (t.detach() for t in case(32, 32, 8, True, dtype=torch.bfloat16))
    out = block_sparse_attention(q, k, v, mask, 8)
    exact = reference.forward(q.float(), k.float(), v.float(), mask, 8, True, 5**-0.5)[0]
    assert_close(out, exact.bfloat16(), rtol=1e-2, atol=1e-3)


def test_layouts_do_not_matter_and_inputs_stay():
    q, k, v, mask = (t.detach() for t in case(32, 32, 8, True))
    expected = block_sparse_attention(q, k, v, mask, 8)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    before = [t.clone() for t in apart]
    assert_close(block_sparse_attention(*apart, mask.mT.contiguous().mT, 8), expected)
    assert_close(apart, before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [*CASES[1:4], (0, 9, 4, False)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.ends("shapes are registered alike")
def test_registration(shape, padded):
    q, k, v, mask = case(*shape, sizes=(1, 2))
    padding = (padding_of(shape[1], 1),) if padded else ()
    for backend in ("rows", "gather") if shape[0] <= shape[2] else ("gather",):
        opcheck(OP, (q, k, v, mask, *shape[2:], SCALE, backend, *padding))


def test_one_graph():
    q, k, v, mask = case(29, 29, 8, True)
    compiled = torch.compile(block_sparse_attention, backend="eager", fullgraph=True)
    assert_close(compiled(q, k, v, mask, 8), block_sparse_attention(q, k, v, mask, 8))
    with kernels("compile"):
        assert_close(block_sparse_attention(q, k, v, mask, 8), compiled(q, k, v, mask, 8))


def test_wrong_arguments_are_named(refuses):
    q, k, v, mask = case(16, 16, 8, True)
    refuses(
        ValueError,
        (
            r"block_mask \(2, 4, 2, 2\) must be \(2, 4, 4, 4\)",
            lambda: block_sparse_attention(q, k, v, mask, 4),
        ),
        (
            r"must be bool with True = keep, got torch\.float32",
            lambda: block_sparse_attention(q, k, v, mask.float(), 8),
        ),
        ("where K divides H", lambda: block_sparse_attention(q[:, :3], k, v, mask[:, :3], 8)),
        ("one dtype", lambda: block_sparse_attention(q.float(), k, v, mask, 8)),
        ("block_size must be at least 1, got 0", lambda: block_sparse_attention(q, k, v, mask, 0)),
        (
            "no more queries than keys, got 16 and 15",
            lambda: block_sparse_attention(q, k[:, :, 1:], v[:, :, 1:], mask, 8),
        ),
        (
            r"padding_mask \(2, 15\) must have the shape \(2, 16\)",
            lambda: block_sparse_attention(q, k, v, mask, 8, padding_mask=padding_of(15)),
        ),
        (
            "must be bool with True = ignore",
            lambda: block_sparse_attention(q, k, v, mask, 8, padding_mask=padding_of(16).long()),
        ),
    )


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.block_sparse_attention import kernel

    return kernel


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in CASES[1:]),
        (CASES[2], torch.float16),
        (CASES[2], torch.bfloat16),
    ],
    ids=str,
)
def test_kernel_matches_definition(shape, dtype, kernel, kernel_device, poisoned_empty):
    q, k, v, mask = (t.detach().to(kernel_device) for t in case(*shape, dtype=dtype, sizes=(1, 2)))
    arguments = (mask, *shape[2:], SCALE)
    before = q.clone(), k.clone(), v.clone()
    exact = [t.float().requires_grad_() for t in (q, k, v)]
    expected, expected_lse = reference.forward(*exact, *arguments)
    out, lse = kernel.forward(q, k, v, *arguments)
    tolerance = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    assert_close(out, expected.to(dtype), **tolerance)
    assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(
        kernel_device, dtype
    )
    wanted = torch.autograd.grad(expected, exact, grad.float())
    found = kernel.backward(grad, q, k, v, mask, out, lse, *shape[2:], SCALE)
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(found, tuple(t.to(dtype) for t in wanted), **tolerance)
    assert_close((q, k, v), before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [CASES[2], CASES[4], CASES[6]], ids=str)
def test_kernel_ignores_padding(shape, kernel, kernel_device, poisoned_empty):
    size, causal = shape[2:]
    *qkv, mask = (
        t.detach().to(kernel_device) for t in case(*shape, dtype=torch.float32, sizes=(2, 2))
    )
    padding = padding_of(shape[1]).to(kernel_device)
    exact = [t.clone().requires_grad_() for t in qkv]
    expected, expected_lse = reference.forward(*exact, mask, size, causal, SCALE, padding)
    q, k, v = qkv[0], *filled_padding(qkv, padding, causal)[1:]
    out, lse = kernel.forward(q, k, v, mask, size, causal, SCALE, padding)
    assert_close(out, expected)
    assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    found = kernel.backward(grad, q, k, v, mask, out, lse, size, causal, SCALE, padding)
    assert_close(found, torch.autograd.grad(expected, exact, grad), rtol=1e-4, atol=1e-5)


def test_kernel_takes_any_layout(kernel, kernel_device, poisoned_empty):
    q, k, v, mask = (t.detach().to(kernel_device) for t in case(20, 20, 16, True, sizes=(2, 2)))
    q, k, v = (t.float().transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    arguments = (mask[:1].expand_as(mask), 16, True, SCALE)
    out, lse = kernel.forward(q, k, v, *arguments)
    exact = [t.requires_grad_() for t in (q, k, v)]
    expected = reference.forward(*exact, *arguments)[0]
    assert_close(out, expected)
    grad = torch.ones((), device=kernel_device).expand(out.shape)
    found = kernel.backward(
        grad, *(t.detach() for t in exact), arguments[0], out, lse, *arguments[1:]
    )
    assert_close(found, torch.autograd.grad(expected, exact, grad), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_triton_mode_on_cuda():
    q, k, v, mask = case(200, 200, 64, True, dtype=torch.float32, dim=64)
    q, k, v = (t.detach().cuda().requires_grad_() for t in (q, k, v))
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            out = block_sparse_attention(q, k, v, mask.cuda(), 64)
        results[mode] = out, *torch.autograd.grad(out.square().sum(), (q, k, v))
    assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-4)


def test_all_blocks_kept_make_no_map_of_all_tokens(monkeypatch):
    monkeypatch.setattr(BlockLayout, "visible", None)  # which would be called
    q, k, v = torch.randn(3, 1, 2, 256, 8, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.ones(1, 2, 16, 16, dtype=torch.bool)
    out = block_sparse_attention(q, k, v, mask, 16, dense_above=0.5)
    assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=True))
