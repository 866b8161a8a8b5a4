from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.compress import reference
from core_gates.ops.compress.op import ActiveTokens, compress, extract

GOLDEN = Path(__file__).parents[2] / "golden" / "attention_sequence" / "seqboat_compress.npz"
SHAPES = [(0, 3, 4), (2, 0, 4), (1, 1, 1), (3, 13, 4), (2, 33, 70)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["transposed", "sliced", "offset", "expanded"]
MASKS = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4)


@pytest.fixture(params=list(product(SHAPES, DTYPES)), ids=str)
def case(request):
    return request.param


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.compress import kernel

    return kernel


def some_active(batch, num_tokens, device="cpu"):
    mask = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:1] = False  # a sequence without any active token
    return ActiveTokens.of(mask.to(device))


def by_loop(x, mask, num_slots):
    out = x.new_zeros(x.shape[0], num_slots, x.shape[-1])
    for b in range(x.shape[0]):
        for slot, token in enumerate(mask[b].nonzero().flatten().tolist()):
            out[b, slot] = x[b, token]
    return out


def test_golden():
    with np.load(GOLDEN) as arrays:
        g = {name: torch.from_numpy(arrays[name]) for name in arrays}
    active = ActiveTokens.of(g["mask"])
    assert torch.equal(active.slots + 1, g["index"])
    compressed = compress(g["x"], active)
    assert torch.equal(compressed, g["compressed"])
    assert torch.equal(extract(compressed, active), g["extracted"])


def test_formula(inputs):
    x = inputs((3, 7, 2), count=1)[0].detach()
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, [1, 4, 5]] = True
    mask[2, 6] = True
    active = ActiveTokens.of(mask)
    assert active.slots.tolist()[0] == [-1, 0, -1, -1, 1, 2, -1]
    assert active.positions.tolist() == [[1, 4, 5], [-1, -1, -1], [6, -1, -1]]
    assert torch.equal(compress(x, active), by_loop(x, mask, 3))


@given(MASKS)
def test_extracting_what_was_compressed_keeps_active_tokens_alone(rows):
    mask = torch.tensor(rows)
    x = torch.randn(*mask.shape, 3)
    active = ActiveTokens.of(mask)
    compressed = compress(x, active)
    assert compressed.shape[1] == max(1, int(mask.sum(-1).max()))
    assert torch.equal(extract(compressed, active), x * mask.unsqueeze(-1))
    assert torch.equal(compressed, by_loop(x, mask, compressed.shape[1]))
    assert torch.equal((active.positions >= 0).sum(-1), mask.sum(-1))
    assert torch.equal(compress(extract(compressed, active), active), compressed)


@given(MASKS)
def test_each_is_the_adjoint_of_the_other(rows):
    active = ActiveTokens.of(torch.tensor(rows))
    x = torch.randn(*active.slots.shape, 3, dtype=torch.float64)
    y = torch.randn(*active.positions.shape, 3, dtype=torch.float64)
    left, right = (compress(x, active) * y).sum(), (x * extract(y, active)).sum()
    assert_close(left, right, rtol=0, atol=1e-12)


def test_a_given_number_of_slots_keeps_the_first_tokens():
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    active = ActiveTokens.of(mask, 2)
    assert active.slots.tolist() == [[0, -1, 1, -1], [-1, 0, -1, -1]]
    assert active.positions.tolist() == [[0, 2], [1, -1]]
    assert ActiveTokens.of(mask, 9).positions.shape == (2, 4)
    everything = ActiveTokens.of(torch.ones(2, 4, dtype=torch.bool), 0)
    assert compress(torch.randn(2, 4, 3), everything).shape == (2, 0, 3)
    assert not extract(torch.zeros(2, 0, 3), ActiveTokens.of(torch.zeros(2, 0).bool())).numel()


def test_what_inactive_tokens_hold_does_not_matter():
    x = torch.randn(2, 3, 2)
    mask = torch.tensor([[False, True, False], [False, False, False]])
    x[~mask] = torch.nan
    x.requires_grad_()
    active = ActiveTokens.of(mask)
    y = extract(compress(x, active), active)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert torch.equal(gradient, mask.unsqueeze(-1).expand_as(x).float())


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 3), (1, 5, 3)])
def test_other_batches_are_refused(shape):
    active = ActiveTokens.of(torch.ones(2, 5, dtype=torch.bool))
    for function in (compress, extract):
        with pytest.raises(ValueError, match=r"must be \(2, 5\) and features"):
            function(torch.zeros(shape), active)


def test_wrong_masks_are_refused(refuses):
    refuses(
        ValueError,
        (
            r"got torch\.int64 \(2, 5\)",
            lambda: ActiveTokens.of(torch.ones(2, 5, dtype=torch.int64)),
        ),
        (
            "must not be negative, got -1",
            lambda: ActiveTokens.of(torch.ones(2, 5, dtype=torch.bool), -1),
        ),
    )


def test_gradients(inputs):
    active = some_active(3, 6)
    x = inputs((3, 6, 2), torch.float64, count=1)[0]
    y = inputs((*active.positions.shape, 2), torch.float64, count=1)[0]
    raw = torch.ops.core_gates.compress.default
    for function, argument in (
        (lambda x: compress(x, active), x),
        (lambda y: extract(y, active), y),
        (lambda x: raw(x, active.positions, active.slots), x),
        (lambda y: raw(y, active.slots, active.positions), y),
    ):
        assert gradcheck(function, (argument,))
        assert gradgradcheck(lambda t, f=function: f(t) ** 2, (argument,))


def test_backward_is_the_derivative_of_forward(inputs):
    active = some_active(3, 6)
    x = inputs((3, 6, 2), torch.float64, count=1)[0]
    compressed = compress(x, active)
    grad = torch.randn_like(compressed)
    (expected,) = torch.autograd.grad(compressed, x, grad)
    assert torch.equal(reference.backward(grad, active.positions, active.slots), expected)


def test_registration(case, inputs):
    shape, dtype = case
    active = some_active(*shape[:2])
    x = inputs(shape, dtype, count=1)[0]
    opcheck(torch.ops.core_gates.compress.default, (x, active.positions, active.slots))


def test_kernel_matches_definition(case, inputs, kernel, kernel_device, poisoned_empty):
    shape, dtype = case
    active = some_active(*shape[:2], kernel_device)
    x = inputs(shape, dtype, count=1)[0].detach().to(kernel_device)
    before = x.clone()
    for rows, inverse, source in (
        (active.positions, active.slots, x),
        (active.slots, active.positions, compress(x, active)),
    ):
        expected = reference.forward(source, rows, inverse)
        assert torch.equal(kernel.forward(source, rows, inverse), expected)
        grad = expected + 1
        found = kernel.backward(grad, rows, inverse)
        assert torch.equal(found, reference.backward(grad, rows, inverse))
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_takes_any_layout(layout, inputs, relayouts, kernel, kernel_device, poisoned_empty):
    x = relayouts[layout](inputs((3, 6, 7), count=1)[0].detach().to(kernel_device))
    active = some_active(3, 6, kernel_device)
    strided = ActiveTokens(*(relayouts["transposed"](t) for t in active))
    found = kernel.forward(x, strided.positions, strided.slots)
    assert torch.equal(found, reference.forward(x, active.positions, active.slots))


def test_compiles_into_one_graph_with_a_given_number_of_slots(inputs):
    x = inputs((3, 6, 2), count=1)[0]

    def through(x, mask):
        active = ActiveTokens.of(mask, 4)
        return extract(compress(x, active) * 2, active)

    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    compiled = torch.compile(through, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, mask), through(x, mask))


@pytest.mark.gpu
def test_triton_mode_on_cuda(inputs):
    x = inputs((3, 33, 70), count=1)[0].detach().cuda().requires_grad_()
    active = some_active(3, 33, "cuda")
    results = []
    for mode in ("reference", "triton"):
        with kernels(mode):
            y = extract(compress(x, active), active)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert_close(*results, rtol=0, atol=0)
