from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.activations import (
    ACTIVATIONS,
    activate,
    activation_gradient,
)
from core_gates.ops import kernels
from core_gates.ops.grouped_linear import blocks, grouped_mm, op, reference, segments
from core_gates.ops.grouped_linear.op import grouped_linear

DIM, WIDTH = 12, 16  # multiples of 16 bytes, which grouped_mm requires
LOADS = {
    "balanced": [4, 4, 4, 4],
    "skewed": [70, 3, 1, 0],
    "one group": [0, 0, 9, 0],
    "no group": [0, 0, 0, 0],
    "rest": [2, 0, 5, 1],
}
REST = 3  # rows of no group
BACKENDS = {"segments": segments, "grouped_mm": grouped_mm}


def problem(
    load, dtype=torch.float32, *, bias=True, gather=True, scatter=True, dim=DIM, width=WIDTH
):
    """Seeded x, weight, counts, bias, gather and scatter."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.tensor(LOADS[load])
    num_rows = int(counts.sum()) + (REST if load == "rest" else 0)

    def randn(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    num_inputs = max(num_rows // 2, 1)
    return (
        randn(num_inputs if gather else num_rows, dim),
        randn(len(counts), width, dim),
        counts,
        randn(len(counts), width) if bias else None,
        torch.randint(num_inputs, (num_rows,), generator=generator) if gather else None,
        torch.randperm(num_rows, generator=generator) if scatter else None,
    )


def leaves(arguments):
    return [t for t in arguments if t is not None and t.requires_grad]


def naive(x, weight, counts, bias, gather, scatter, activation, gated):
    """Row by row, from the sentence that defines the op."""
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    group = torch.repeat_interleave(counts).tolist()
    out = x.new_zeros(num_rows, WIDTH // 2 if gated else WIDTH)
    for n in range(num_rows):
        row = x[n if gather is None else gather[n]]
        if n < len(group):
            z = weight[group[n]] @ row
            z = z if bias is None else z + bias[group[n]]
            value = activate(z, activation, gated)
            out = out.index_put((torch.tensor(n if scatter is None else int(scatter[n])),), value)
    return out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("load", LOADS)
def test_definition(load, gated):
    arguments = problem(load, torch.float64)
    expected = naive(*arguments, "silu", gated)
    assert_close(reference.forward(*arguments, "silu", gated), expected)
    assert_close(
        grouped_linear(
            *arguments[:3],
            bias=arguments[3],
            gather=arguments[4],
            scatter=arguments[5],
            activation="silu",
            gated=gated,
        ),
        expected,
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_gradient(name, gated, inputs):
    grad, z = inputs((3, 6), torch.float64)
    out = activate(z, name, gated)
    grad = grad[:, : out.shape[1]].detach()
    expected = torch.autograd.grad(out, z, grad)[0]
    assert_close(activation_gradient(grad, z.detach(), name, gated), expected)


def test_activations_by_their_names(inputs):
    z = inputs((2, 8), count=1)[0]
    gate, up = z[:, :4], z[:, 4:]
    assert_close(activate(z, "silu", True), F.silu(gate) * up)
    assert_close(activate(z, "gelu", False), F.gelu(z))
    assert_close(activate(z, "gelu_tanh", False), F.gelu(z, approximate="tanh"))
    assert_close((activate(z, "relu", False), activate(z, "identity", False)), (z.clamp(min=0), z))


@pytest.mark.parametrize("op_", [reference.forward, grouped_linear])
def test_gradients_of_the_definition(op_):
    x, weight, counts, bias, gather, scatter = problem("rest", torch.float64, dim=2, width=4)

    def call(x, weight, bias):
        if op_ is grouped_linear:
            how = {"bias": bias, "gather": gather, "scatter": scatter}
            return grouped_linear(x, weight, counts, activation="silu", gated=True, **how)
        return reference.forward(x, weight, counts, bias, gather, scatter, "silu", True)

    assert gradcheck(call, (x, weight, bias))
    assert gradgradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("options", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_match_the_definition(backend, options, load, poisoned_empty, weight_first):
    bias, indexed, gated = options
    arguments = problem(load, bias=bias, gather=indexed, scatter=indexed)
    expected = reference.forward(*arguments, "silu", gated)
    for keep in (False, True):
        found, kept = op._forward(*arguments, "silu", gated, keep, backend)
        assert_close(found, expected)
        assert kept.shape[0] == (expected.shape[0] if keep else 0)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    assert_close(
        torch.autograd.grad(found, leaves(arguments), grad),
        torch.autograd.grad(expected, leaves(arguments), grad),
        rtol=1e-5,
        atol=1e-5,
    )


def detached(arguments):
    return [t if t is None else t.detach() for t in arguments]


@pytest.mark.parametrize("counts", [[], [0, 3], [1], [4, 0, 1, 5], [17, 2, 3]])
def test_blocks_cover_every_row(counts):
    group_of_row = torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).tolist()
    seen = set()
    for groups, numbers in blocks.cut(counts):
        assert len(groups) == len(numbers) > 1
        for group, rows in zip(groups, numbers, strict=True):
            assert len(rows) in blocks.SIZES
            assert all(group_of_row[row] == group for row in rows)
            seen.update(rows)
    assert seen == set(range(len(group_of_row)))


def test_compile_mode_reads_few_rows_by_blocks(monkeypatch):
    calls = []
    monkeypatch.setattr(segments, "WEIGHT_FIRST", True)
    monkeypatch.setattr(blocks, "_compiled", lambda: calls.append(1) or blocks._product)
    x, weight, counts, *_ = detached(problem("rest", gather=False))
    expected = grouped_linear(x, weight, counts)
    assert not calls
    with kernels("compile"):
        assert_close(grouped_linear(x, weight, counts), expected)
        assert calls
        calls.clear()
        grouped_linear(x, weight.requires_grad_(), counts).sum().backward()
        monkeypatch.setattr(segments, "WEIGHT_FIRST", False)
        assert_close(grouped_linear(x, weight.detach(), counts), expected)
    assert not calls


def test_registration():
    full = (*problem("rest"), "silu", True, True, "segments")
    opcheck(torch.ops.core_gates.grouped_linear.default, full)


def test_gradients_of_the_op_in_double_precision():
    x, weight, counts, bias, gather, scatter = problem("rest", torch.float64, dim=2, width=4)

    def call(x, weight, bias):
        how = (gather, scatter, "gelu", True, True, "segments")
        return op._forward(x, weight, counts, bias, *how)[0]

    assert gradcheck(call, (x, weight, bias))


def test_expanded_gradients_and_other_layouts(relayouts):
    x, weight, counts, *_ = problem("balanced", bias=False, gather=False, scatter=False)
    expected = torch.autograd.grad(reference.forward(x, weight, counts).sum(), (x, weight))
    for name in ("transposed", "sliced", "offset"):
        inputs = [relayouts[name](t) for t in (x, weight)]
        found = torch.autograd.grad(grouped_linear(*inputs, counts).sum(), (x, weight))
        assert_close(found, expected)


def test_only_the_gradients_asked_for():
    x, weight, counts, *_ = problem("balanced", bias=False, gather=False, scatter=False)
    frozen = grouped_linear(x, weight.detach(), counts, activation="silu")
    both = grouped_linear(x, weight, counts, activation="silu")
    assert_close(*(torch.autograd.grad(o.square().sum(), x)[0] for o in (frozen, both)))
    assert_close(
        torch.autograd.grad(
            grouped_linear(x.detach(), weight, counts, activation="silu").square().sum(), weight
        )[0],
        torch.autograd.grad(
            grouped_linear(x, weight, counts, activation="silu").square().sum(), weight
        )[0],
    )


def test_bfloat16():
    arguments = problem("skewed", torch.bfloat16)
    exact = [t.float() if t is not None and t.is_floating_point() else t for t in arguments]
    x, weight, counts, bias, gather, scatter = arguments
    how = {"bias": bias, "gather": gather, "scatter": scatter, "activation": "silu"}
    out = grouped_linear(x, weight, counts, **how)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), reference.forward(*exact, "silu"), rtol=2e-2, atol=5e-2)


def test_autocast_casts_the_products():
    x, weight, counts, *_ = problem("skewed", bias=False, gather=False, scatter=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_linear(x, weight, counts)
    assert_close(out, grouped_linear(x.bfloat16(), weight.bfloat16(), counts), rtol=0, atol=0)
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


def test_compiles_into_one_graph():
    x, weight, counts, *_ = problem("rest", bias=False, gather=False, scatter=False)

    def call(x, weight, counts):
        return grouped_linear(x, weight, counts, activation="silu", gated=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = [f(x, weight, counts) for f in (compiled, call)]
    assert_close(*results)
    assert_close(*(torch.autograd.grad(r.square().sum(), (x, weight)) for r in results))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5)}, r"x \(4, 5\) must be \(M, D\) and weight \(2, 6, 3\)"),
        ({"counts": torch.zeros(3)}, r"counts \(3,\) must have the shape \(2,\)"),
        ({"bias": torch.zeros(2, 5)}, r"bias \(2, 5\) must have the shape \(2, 6\)"),
        ({"scatter": torch.zeros(3)}, r"scatter \(3,\) must have the shape \(4,\)"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose one of identity, relu"),
        ({"weight": torch.zeros(2, 5, 3), "gated": True}, "need an even number of features, got 5"),
    ],
)
def test_wrong_arguments(refuses, change, message):
    good = {"x": torch.zeros(4, 3), "weight": torch.zeros(2, 6, 3), "counts": torch.tensor([1, 3])}
    refuses(ValueError, (message, lambda: grouped_linear(**(good | change))))
