"""Ops of one formula: values, gradients, dtypes, shapes and compilation, for each in a table."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.ops import (
    ActiveTokens,
    compress,
    extract,
    gate_multiply,
    kernels,
    silu_gate,
    smooth_step,
    soft_threshold,
)

GOLDEN = Path(__file__).parents[2] / "golden"
GAMMA, THRESHOLD = 3.0, 0.5
MASK = torch.tensor([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
ACTIVE = ActiveTokens.of(MASK)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MASKS = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4)


def cubic(z):
    inside = -2 * z**3 / GAMMA**3 + 3 * z / (2 * GAMMA) + 0.5
    return torch.where(z <= -GAMMA / 2, 0, torch.where(z >= GAMMA / 2, 1, inside))


def slots_by_loop(x):
    out = x.new_zeros(3, 3, x.shape[-1])
    out[0, 0], out[0, 1], out[0, 2], out[2, 0] = x[0, 1], x[0, 4], x[0, 5], x[2, 5]
    return out


def tokens_by_loop(y):
    out = y.new_zeros(3, 6, y.shape[-1])
    out[0, 1], out[0, 4], out[0, 5], out[2, 5] = y[0, 0], y[0, 1], y[0, 2], y[2, 0]
    return out


def active_on(device):
    return ActiveTokens.of(MASK.to(device), 3)


class Op(NamedTuple):
    """An op of some tensors of one shape, and what it is by its closed form."""

    name: str
    call: object
    formula: object
    inputs: int = 1
    shape: tuple = (3, 5)

    def __call__(self, *tensors):
        return many(self.call(*tensors))

    def exact(self, *tensors):
        return many(self.formula(*tensors))


def many(results):
    return results if isinstance(results, tuple) else (results,)


def threshold_of(x):
    return x.sign() * (x.abs() - THRESHOLD).clamp(min=0)


GATES = [
    Op("gate_multiply", gate_multiply, lambda x, g: x / (1 + torch.exp(-g)), 2),
    Op("silu_gate", silu_gate, lambda a, g: (F.silu(a) * g.sigmoid(), g.sigmoid()), 2),
]
OPS = [
    *GATES,
    Op("smooth_step", lambda z: smooth_step(z, GAMMA), cubic),
    Op("soft_threshold", lambda x: soft_threshold(x, THRESHOLD), threshold_of),
    Op("compress", lambda x: compress(x, active_on(x.device)), slots_by_loop, shape=(3, 6, 2)),
    Op("extract", lambda y: extract(y, active_on(y.device)), tokens_by_loop, shape=(3, 3, 2)),
]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@each_op
def test_values_are_those_of_the_closed_form(op, inputs):
    tensors = inputs(op.shape, torch.float64, count=op.inputs)
    assert_close(op(*tensors), op.exact(*tensors), rtol=0, atol=1e-15)


@each_op
def test_gradients(op, inputs):
    tensors = inputs(op.shape, torch.float64, count=op.inputs)
    assert gradcheck(op, tensors)
    assert gradgradcheck(lambda *t: tuple(y**2 for y in op(*t)), tensors)


@each_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(op, dtype, inputs):
    tensors = inputs(op.shape, dtype, count=op.inputs)
    exact = op(*(t.float() for t in tensors))
    found = op(*tensors)
    assert_close(found, tuple(y.to(dtype) for y in exact), rtol=0, atol=0)
    grads = torch.autograd.grad(found, tensors, [torch.ones_like(y) for y in found])
    assert [g.dtype for g in grads] == [dtype] * op.inputs


@each_op
def test_any_layout_gives_the_same(op, inputs, relayouts):
    tensors = [t.detach() for t in inputs(op.shape, count=op.inputs)]
    for name in ("transposed", "sliced", "offset"):
        moved = op(*(relayouts[name](t) for t in tensors))
        assert_close(moved, op(*tensors), rtol=0, atol=0)


@each_op
def test_a_nan_stays_in_its_place(op, inputs):
    tensors = [t.detach() for t in inputs(op.shape, count=op.inputs)]
    for number in range(op.inputs):
        spoiled = [t.clone() for t in tensors]
        place = (0,) * len(op.shape) if op.name != "compress" else (0, 1, 0)
        spoiled[number][place] = torch.nan
        for found, exact in zip(op(*spoiled), op.exact(*spoiled), strict=True):
            assert torch.equal(found.isnan(), exact.isnan())
        assert sum(int(y.isnan().sum()) for y in op(*spoiled)) >= 1


@pytest.mark.parametrize("op", OPS[:4], ids=lambda op: op.name)
@pytest.mark.parametrize("shape", [(0, 4), (), (1,)])
def test_no_values_and_one(op, shape):
    x = torch.full(shape, 0.75, dtype=torch.float64, requires_grad=True)
    found = op(*[x] * op.inputs)
    assert_close(found, op.exact(*[x] * op.inputs), rtol=0, atol=1e-15)
    found[0].sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("function", [compress, extract])
@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4), (2, 3, 0)])
def test_no_tokens_no_sequences_and_no_features(function, shape):
    x = torch.zeros(shape, requires_grad=True)
    found = function(x, ActiveTokens.of(torch.ones(shape[:2], dtype=torch.bool), shape[1]))
    assert found.shape == shape
    found.sum().backward()
    assert x.grad.shape == shape


@each_op
@pytest.mark.parametrize("device", DEVICES)
def test_one_device_gives_what_another_does(op, device, inputs):
    results = []
    for place in ("cpu", device):
        made = inputs(op.shape, count=op.inputs)
        tensors = [t.detach().to(place).requires_grad_() for t in made]
        with kernels("triton"):
            found = op(*tensors)
        grads = torch.autograd.grad(sum(y.square().sum() for y in found), tensors)
        results.append([t.cpu() for t in (*found, *grads)])
    assert_close(*results)


@each_op
def test_compiles_into_one_graph(op, inputs):
    tensors = inputs(op.shape, count=op.inputs)
    traced = torch.compile(op.call, backend="aot_eager", fullgraph=True)
    results = []
    for call in (traced, op.call):
        found = many(call(*tensors))
        grads = torch.autograd.grad(sum(y.square().sum() for y in found), tensors)
        results.append((*found, *grads))
    assert_close(*results)


@pytest.mark.slow
@each_op
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor's own imports
def test_compile_mode_gives_the_same(op, inputs, inductor):
    tensors = inputs(op.shape, count=op.inputs)
    results = []
    for mode in ("compile", "reference"):
        with kernels(mode):
            found = op(*tensors)
        grads = torch.autograd.grad(sum(y.square().sum() for y in found), tensors)
        results.append((*found, *grads))
    assert_close(*results)


@pytest.mark.parametrize("op", GATES, ids=lambda op: op.name)
def test_dtypes_may_differ_and_shapes_must_agree(op, inputs):
    first, second = inputs((4, 5))
    found = op(first, second.bfloat16())
    assert [y.dtype for y in found] == [torch.float32, torch.bfloat16][: len(found)]
    assert_close(found[0], op(first, second.bfloat16().float())[0])
    with pytest.raises(ValueError, match=r" \(2, 3\) and .* \(3,\) must have one shape"):
        op(torch.zeros(2, 3), torch.zeros(3))


def test_saturated_gates_have_finite_gradients():
    a = torch.tensor([-80.0, 200.0, 0.0, 0.0], requires_grad=True)
    g = torch.tensor([0.0, 0.0, -200.0, 200.0], requires_grad=True)
    grads = torch.autograd.grad(silu_gate(a, g), (a, g), [torch.ones(4)] * 2)
    assert_close(grads[0], torch.tensor([0.0, 0.5, 0.0, 0.5]))
    assert_close(grads[1], torch.tensor([0.25, 50.25, 0.0, 0.0]))


@given(st.floats(2**-10, 2**10, width=32), st.floats(-2, 2, width=32))
def test_the_step_is_exact_outside_the_band_and_symmetric_inside(gamma, place):
    z = torch.tensor([gamma / 2, gamma, 1e30, gamma * place], requires_grad=True)
    up, down = smooth_step(z, gamma), smooth_step(-z, gamma)
    assert (up[:3].tolist(), down[:3].tolist()) == ([1, 1, 1], [0, 0, 0])
    assert_close(up + down, torch.ones(4))
    (slope,) = torch.autograd.grad(up.sum(), z)
    assert slope[:3].tolist() == [0, 0, 0]
    assert 0 <= slope[3] <= 1.5 / gamma * (1 + 1e-6)
    assert slope[3] > 0 or abs(place) > 0.499


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_gamma_is_checked(gamma):
    with pytest.raises(ValueError, match=f"gamma must be positive and finite, got {gamma}"):
        smooth_step(torch.zeros(2), gamma)


def test_golden_threshold():
    with np.load(GOLDEN / "moe_inference_sora" / "sora.npz") as arrays:
        x, expected = (torch.from_numpy(arrays[name]) for name in ("prox_in", "prox_soft"))
        threshold = float(arrays["prox_lambda"])
    assert_close(soft_threshold(x, threshold), expected, rtol=0, atol=1e-15)


def test_the_threshold_solves_the_l1_problem_and_cuts_gradients():
    """Argmin over a fine grid of (z - x)² / 2 + ξ |z|; at the threshold itself nothing passes."""
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    x = torch.tensor([-2.345, -0.5, 0.2, 0.5, 1.7], dtype=torch.float64, requires_grad=True)
    best = [grid[((grid - v) ** 2 / 2 + 0.5 * grid.abs()).argmin()] for v in x.detach()]
    found = soft_threshold(x, 0.5)
    assert_close(found, torch.stack(best), atol=6e-4, rtol=0)
    assert torch.autograd.grad(found.sum(), x)[0].tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_thresholds_are_checked(threshold):
    with pytest.raises(ValueError, match="threshold must not be negative"):
        soft_threshold(torch.zeros(2), threshold)


def test_golden_compression():
    with np.load(GOLDEN / "attention_sequence" / "seqboat_compress.npz") as arrays:
        g = {name: torch.from_numpy(arrays[name]) for name in arrays}
    active = ActiveTokens.of(g["mask"])
    assert torch.equal(active.slots + 1, g["index"])
    compressed = compress(g["x"], active)
    assert torch.equal(compressed, g["compressed"])
    assert torch.equal(extract(compressed, active), g["extracted"])


def test_slots_are_given_in_the_order_of_tokens():
    assert ACTIVE.slots.tolist()[0] == [-1, 0, -1, -1, 1, 2]
    assert ACTIVE.positions.tolist() == [[1, 4, 5], [-1, -1, -1], [5, -1, -1]]
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    active = ActiveTokens.of(mask, 2)
    assert active.slots.tolist() == [[0, -1, 1, -1], [-1, 0, -1, -1]]
    assert active.positions.tolist() == [[0, 2], [1, -1]]
    assert ActiveTokens.of(mask, 9).positions.shape == (2, 4)
    everything = ActiveTokens.of(torch.ones(2, 4, dtype=torch.bool), 0)
    assert compress(torch.randn(2, 4, 3), everything).shape == (2, 0, 3)


@given(MASKS)
def test_extracting_what_was_compressed_keeps_active_tokens_alone(rows):
    mask = torch.tensor(rows)
    x = torch.randn(*mask.shape, 3, dtype=torch.float64)
    active = ActiveTokens.of(mask)
    compressed = compress(x, active)
    assert compressed.shape[1] == max(1, int(mask.sum(-1).max()))
    assert torch.equal(extract(compressed, active), x * mask.unsqueeze(-1))
    assert torch.equal((active.positions >= 0).sum(-1), mask.sum(-1))
    assert torch.equal(compress(extract(compressed, active), active), compressed)
    y = torch.randn_like(compressed)
    left, right = (compressed * y).sum(), (x * extract(y, active)).sum()
    assert_close(left, right, rtol=0, atol=1e-12)  # each is the adjoint of the other


def test_what_inactive_tokens_hold_does_not_matter():
    x = torch.randn(3, 6, 2)
    x[~MASK] = torch.nan
    x.requires_grad_()
    y = extract(compress(x, ACTIVE), ACTIVE)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert torch.equal(gradient, MASK.unsqueeze(-1).expand_as(x).float())


def test_a_given_number_of_slots_compiles_into_one_graph(inputs):
    def through(x, mask):
        active = ActiveTokens.of(mask, 4)
        return extract(compress(x, active) * 2, active)

    (x,) = inputs((3, 6, 2), count=1)
    compiled = torch.compile(through, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, MASK), through(x, MASK))


def test_wrong_masks_and_batches_are_refused(refuses):
    active = ActiveTokens.of(torch.ones(2, 5, dtype=torch.bool))
    of_others = [
        (r"must be \(2, 5\) and features", lambda s=shape, f=function: f(torch.zeros(s), active))
        for shape in ((2, 5), (2, 4, 3), (1, 5, 3))
        for function in (compress, extract)
    ]
    whole, yes = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    refuses(
        ValueError,
        (r"got torch\.int64 \(2, 5\)", lambda: ActiveTokens.of(whole)),
        ("must not be negative, got -1", lambda: ActiveTokens.of(yes, -1)),
        *of_others,
    )
