"""The convolutions of Adas and their gate, at the shapes of its `era5` preset."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.comparison import Call, Comparison, Load, Work

SCALES = (
    (16, (2, 31, 60), (3, 5, 7)),
    (32, (2, 16, 30), (3, 3, 5)),
    (64, (2, 8, 15), (3, 3, 3)),
)
"""Features, tokens and kernel at the three scales of the `era5` preset."""

BATCH = 4
LAYOUT_BAR = 1.2
Kernel = tuple[int, int, int]


def comparisons() -> Iterator[Comparison]:
    """The gate, the convolution alone, and gated convolutions; on one CPU thread."""
    yield silu_gate()
    yield conv_backward()
    for scale in SCALES:
        yield gated_conv(*scale)


def silu_gate() -> Comparison:
    """Return the gate of a batch, forward and backward, plain and compiled."""
    dim, tokens, _ = SCALES[0]
    shape = (BATCH, dim, *tokens)

    def build(load: Load) -> Mapping[str, Call]:
        op = load("core_gates.ops").silu_gate
        a, g = (randn(shape, seed).requires_grad_() for seed in range(2))
        grads = [randn(shape, 2), randn(shape, 3)]
        kernels = load("core_gates.ops").kernels

        def compiled(a: Tensor, g: Tensor) -> Sequence[Tensor]:
            with kernels("compile"):
                return cast(Sequence[Tensor], op(a, g))

        def gradients(gate: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Call:
            return lambda: torch.autograd.grad(gate(a, g), (a, g), grads)

        return {
            "eager": gradients(_eager_gate),
            "silu_gate": gradients(op),
            "torch.compile": gradients(compiled),
        }

    return Comparison(
        name=f"silu_gate forward+backward {_size(shape)}",
        op="silu_gate",
        build=build,
        baseline="eager",
        work=Work(bytes=4.0 * math.prod(shape) * 10),  # reads 2 and 4 arrays, writes 2 and 2
        first_calls=("torch.compile",),
    )


def conv_backward() -> Comparison:
    """Return the backward pass of one convolution in token layout against contiguous Conv3d."""
    dim, tokens, kernel = SCALES[0]
    shape = (BATCH, dim, *tokens)
    padding = [extent // 2 for extent in kernel]

    def build(load: Load) -> Mapping[str, Call]:
        same_conv = load("core_gates.conv").same_conv
        weight = randn((dim, dim, *kernel), 0)

        def conv3d(x: Tensor, weight: Tensor) -> Tensor:
            return F.conv3d(x, weight, padding=padding)

        return {
            "Conv3d, contiguous": _backward(conv3d, randn(shape, 1), weight),
            "same_conv, token layout": _backward(same_conv, token_layout(shape, 1), weight),
            "Conv3d, token layout": _backward(conv3d, token_layout(shape, 1), weight),
        }

    return Comparison(
        name=f"convolution backward {_size(shape)}, kernel {_size(kernel)}",
        op="same_conv",
        build=build,
        baseline="Conv3d, contiguous",
        bars={"same_conv, token layout": LAYOUT_BAR},
    )


def gated_conv(dim: int, tokens: tuple[int, int, int], kernel: Kernel) -> Comparison:
    """Return the backward pass of a gated convolution in token layout against contiguous."""
    shape = (BATCH, dim, *tokens)

    def build(load: Load) -> Mapping[str, Call]:
        torch.manual_seed(0)
        module = load("core_gates.conv").GatedConv(dim, dim, kernel, circular=True)

        def backward(make: Callable[[Sequence[int], int], Tensor]) -> Call:
            streams = [make(shape, seed).requires_grad_() for seed in range(3)]
            outputs = module(*streams)
            wanted = [*streams, *module.parameters()]
            grads = [make(shape, seed) for seed in range(3, 6)]
            return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

        return {"contiguous": backward(randn), "token layout": backward(token_layout)}

    return Comparison(
        name=f"GatedConv backward {_size(shape)}, kernel {_size(kernel)}",
        op="gated_conv",
        build=build,
        baseline="contiguous",
        bars={"token layout": LAYOUT_BAR},
    )


def randn(shape: Sequence[int], seed: int) -> Tensor:
    """Return a contiguous normal array."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_layout(shape: Sequence[int], seed: int) -> Tensor:
    """Return the same array with features last in memory, as attention leaves its tokens."""
    return randn(shape, seed).movedim(1, -1).contiguous().movedim(-1, 1)


def _backward(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Call:
    inputs = [x.requires_grad_(), weight.detach().clone().requires_grad_()]
    output = function(*inputs)
    grad = torch.empty_strided(output.shape, x.stride()).copy_(randn(output.shape, 2))
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def _eager_gate(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    gate = g.sigmoid()
    return F.silu(a) * gate, gate


def _size(extents: Sequence[int]) -> str:
    return "x".join(map(str, extents))
