"""What holds for every elementwise operator."""

from importlib import import_module
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from core_gates.ops import kernels

SHAPES = [(0, 4), (1,), (), (3, 63), (2, 5, 1000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["transposed", "sliced", "offset", "expanded"]


class Op(NamedTuple):
    """An operator of some tensors of one shape, which may be followed by a number."""

    name: str
    inputs: int = 2
    outputs: int = 1
    number: tuple = ()

    def module(self, name):
        return import_module(f"core_gates.ops.{self.name}.{name}")

    def __call__(self, *tensors):
        return many(getattr(self.module("op"), self.name)(*tensors, *self.number))

    def registered(self, *tensors):
        return many(getattr(torch.ops.core_gates, self.name).default(*tensors, *self.number))

    def forward(self, *tensors, by="reference"):
        return many(self.module(by).forward(*tensors, *self.number))

    def backward(self, *tensors, by="reference"):
        return many(self.module(by).backward(*tensors, *self.number))


def many(results):
    return results if isinstance(results, tuple) else (results,)


OPS = [
    Op("gate_multiply"),
    Op("silu_gate", outputs=2),
    Op("smooth_step", inputs=1, number=(3.0,)),
    Op("soft_threshold", inputs=1, number=(0.5,)),
]
pytestmark = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_rounds_once(op, dtype, inputs):
    tensors = inputs((40, 25), dtype, count=op.inputs)
    exact = op.forward(*(t.float() for t in tensors))
    assert_close(op(*tensors), tuple(t.to(dtype) for t in exact), rtol=0, atol=0)


@pytest.mark.parametrize("call", ["__call__", "registered"])
def test_gradients(op, call, inputs):
    assert gradcheck(getattr(op, call), inputs((3, 5), torch.float64, count=op.inputs))


def test_second_derivatives_of_the_definition(op, inputs):
    def squares(*tensors):
        return tuple(result**2 for result in op(*tensors))

    assert gradgradcheck(squares, inputs((3, 5), torch.float64, count=op.inputs))


def test_backward_is_the_derivative_of_forward(op, inputs):
    every = inputs((6, 9), torch.float64, count=op.outputs + op.inputs)
    gradients, tensors = every[: op.outputs], every[op.outputs :]
    expected = torch.autograd.grad(op(*tensors), tensors, gradients)
    assert_close(op.backward(*every), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("shape", "dtype"), list(product(SHAPES, DTYPES)), ids=str)
def test_registration(op, shape, dtype, inputs):
    tensors = inputs(shape, dtype, count=op.inputs)
    opcheck(getattr(torch.ops.core_gates, op.name).default, (*tensors, *op.number))


@pytest.mark.parametrize("layouts", list(product(LAYOUTS[:2], repeat=2)), ids=str)
def test_registration_keeps_layouts(op, layouts, inputs, relayouts):
    given = zip(layouts, inputs((4, 6), count=op.inputs), strict=False)
    tensors = [relayouts[name](t.detach()).requires_grad_() for name, t in given]
    opcheck(getattr(torch.ops.core_gates, op.name).default, (*tensors, *op.number))


@pytest.mark.parametrize(("shape", "dtype"), list(product(SHAPES, DTYPES)), ids=str)
def test_kernel_matches_definition(op, shape, dtype, inputs, kernel_device, poisoned_empty):
    made = inputs(shape, dtype, count=op.outputs + op.inputs)
    every = [t.detach().to(kernel_device) for t in made]
    before, tensors = [t.clone() for t in every], every[op.outputs :]
    assert_close(op.forward(*tensors, by="kernel"), op.forward(*tensors))
    assert_close(op.backward(*every, by="kernel"), op.backward(*every))
    assert_close(every, before, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "second"), list(product(LAYOUTS, repeat=2)))
def test_kernel_takes_any_layout(
    op, first, second, inputs, relayouts, kernel_device, poisoned_empty
):
    made = inputs((6, 7), count=op.outputs + op.inputs)
    names = [second, first][: op.outputs] + [first, second][: op.inputs]
    every = [relayouts[n](t.detach().to(kernel_device)) for n, t in zip(names, made, strict=True)]
    before, tensors = [t.clone() for t in every], every[op.outputs :]
    outputs, gradients = op.forward(*tensors, by="kernel"), op.backward(*every, by="kernel")
    assert_close(outputs, op.forward(*tensors))
    assert_close(gradients, op.backward(*every))
    for results in (outputs, gradients):
        for like, result in zip(tensors, results, strict=False):
            assert result.stride() == torch.zeros_like(like).stride()
    assert_close(every, before, rtol=0, atol=0)


@pytest.mark.gpu
def test_triton_mode_on_cuda(op, inputs):
    made = inputs((3, 63), count=op.outputs + op.inputs)
    every = [t.detach().cuda().requires_grad_() for t in made]
    gradients, tensors = every[: op.outputs], every[op.outputs :]
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            outputs = op(*tensors)
        results[mode] = *outputs, *torch.autograd.grad(outputs, tensors, gradients)
    assert_close(results["triton"], results["reference"])
