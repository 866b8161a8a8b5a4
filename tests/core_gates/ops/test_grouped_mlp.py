from itertools import product

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.activations import ACTIVATIONS
from core_gates.ops.grouped_mlp import op, reference
from core_gates.ops.grouped_mlp.op import grouped_mlp

DIM, HIDDEN, OUT = 6, 5, 7
LOADS = {
    "balanced": [6, 6, 6],
    "skewed": [30, 2, 0],
    "one group": [0, 20, 0],
    "no group": [0, 0, 0],
    "rest": [8, 0, 9],
}
REST = 4  # rows of no group


def problem(load, *, bias=True, gather=True, gated=True, dtype=torch.float32):
    """Seeded arguments by name; all floating ones need gradients."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.tensor(LOADS[load])
    num_rows = int(counts.sum()) + (REST if load == "rest" else 0)

    def randn(*shape):
        return (torch.randn(*shape, generator=generator) / 2).to(dtype).requires_grad_()

    num_inputs = max(num_rows // 2, 1)
    width = 2 * HIDDEN if gated else HIDDEN
    return {
        "x": randn(num_inputs if gather else num_rows, DIM),
        "first": randn(len(counts), width, DIM),
        "down": randn(len(counts), OUT, HIDDEN),
        "counts": counts,
        "first_bias": randn(len(counts), width) if bias else None,
        "down_bias": randn(len(counts), OUT) if bias else None,
        "gather": torch.randint(num_inputs, (num_rows,), generator=generator) if gather else None,
        "gated": gated,
    }


def exact(arguments):
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def leaves(arguments):
    return [t for t in arguments.values() if torch.is_tensor(t) and t.requires_grad]


def test_the_formula_row_by_row():
    arguments = problem("rest", gated=True)
    x, first, down = arguments["x"], arguments["first"], arguments["down"]
    group = torch.repeat_interleave(arguments["counts"]).tolist()
    found = grouped_mlp(**arguments, activation="gelu")
    for n, e in enumerate(group):
        z = F.linear(x[arguments["gather"][n]], first[e], arguments["first_bias"][e])
        hidden = F.gelu(z[:HIDDEN]) * z[HIDDEN:]
        assert_close(found[n], F.linear(hidden, down[e], arguments["down_bias"][e]))
    assert found.shape == (len(group) + REST, OUT)
    assert not found[len(group) :].any()


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("options", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_and_gradients_are_those_of_the_definition(
    activation, options, load, poisoned_empty
):
    bias, gather, gated = options
    arguments = problem(load, bias=bias, gather=gather, gated=gated)
    precise = exact(arguments)
    expected = reference.forward(**precise, activation=activation)
    found = grouped_mlp(**arguments, activation=activation)
    assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_close(grouped_mlp(**arguments, activation=activation), found, rtol=0, atol=0)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    assert_close(
        [g.double() for g in torch.autograd.grad(found, leaves(arguments), grad)],
        list(torch.autograd.grad(expected, leaves(precise), grad.double())),
        rtol=1e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("wanted", ["x", "first", "down", "first_bias", "down_bias"])
def test_only_the_gradients_asked_for(wanted, monkeypatch):
    arguments = problem("rest")
    expected = torch.autograd.grad(grouped_mlp(**arguments).square().sum(), arguments[wanted])
    frozen = {
        name: value.detach() if torch.is_tensor(value) and name != wanted else value
        for name, value in arguments.items()
    }
    asked = []
    backward = op._backward
    monkeypatch.setattr(op, "_backward", lambda *a: asked.append(a[-1]) or backward(*a))
    assert_close(
        torch.autograd.grad(grouped_mlp(**frozen).square().sum(), frozen[wanted]), expected
    )
    assert [sum(needs) for needs in asked] == [1]


def test_registration():
    arguments = problem("rest")
    names = ("x", "first", "down", "counts", "first_bias", "down_bias", "gather")
    opcheck(
        torch.ops.core_gates.grouped_mlp.default,
        (*(arguments[name] for name in names), "silu", True, True),
    )


@torch.no_grad()
def test_only_values_before_the_activation_are_kept():
    arguments = list(problem("balanced", gated=False).values())[:-1]
    sizes = [op._run(*arguments, "silu", False, keep)[1].shape for keep in (True, False)]
    assert sizes == [(18, HIDDEN), (0, HIDDEN)]


def test_half_precision_and_autocast():
    arguments = problem("skewed", dtype=torch.bfloat16)
    out = grouped_mlp(**arguments)
    assert out.dtype == torch.bfloat16
    assert_close(out.double(), reference.forward(**exact(arguments)), rtol=5e-2, atol=0.2)
    arguments = problem("skewed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = grouped_mlp(**arguments)
    assert_close(cast, out, rtol=0, atol=0)
    assert torch.autograd.grad(cast.sum(), arguments["first"])[0].dtype == torch.float32


def test_compiles_into_one_graph():
    arguments = problem("rest")
    compiled = torch.compile(grouped_mlp, backend="aot_eager", fullgraph=True)
    results = [f(**arguments) for f in (compiled, grouped_mlp)]
    assert_close(*results)
    assert_close(*(torch.autograd.grad(r.square().sum(), leaves(arguments)) for r in results))


def test_more_rows_than_there_are_are_refused():
    with pytest.raises(ValueError, match="counts are those of 45 rows, but there are 18"):
        grouped_mlp(**(problem("balanced") | {"counts": torch.tensor([15, 15, 15])}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(18, 5)}, r"x \(18, 5\) must be \(M, D\), first \(3, 10, 6\)"),
        ({"down": torch.zeros(3, 7, 4)}, r"down \(3, 7, 4\) must have the shape \(3, D, 5\)"),
        ({"counts": torch.ones(2).long()}, r"counts \(2,\) must have the shape \(3,\)"),
        ({"first_bias": torch.zeros(3, 5)}, r"first_bias \(3, 5\) must have the shape \(3, 10\)"),
        ({"down_bias": torch.zeros(3, 6)}, r"down_bias \(3, 6\) must have the shape \(3, 7\)"),
        ({"gather": torch.zeros(9, 2).long()}, r"gather \(9, 2\) must have one dimension"),
        ({"first": torch.zeros(3, 9, 6)}, "need an even number of features, got 9"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose one of identity, relu"),
    ],
)
def test_wrong_arguments(refuses, change, message):
    refuses(ValueError, (message, lambda: grouped_mlp(**(problem("balanced") | change))))
