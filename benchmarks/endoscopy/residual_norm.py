"""The seam of a gated transformer: gate, residual sum and the LayerNorm that follows."""

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Call, Comparison, Load, Work

SHAPE = (32, 577, 192)
"""Batch, tokens and features of ViT-Ti/16 at 384 pixels."""

EAGER, OURS = "eager", "gated_residual_norm"
COMPILED, CPP = f"{OURS}, compiled", f"{OURS}, C++"
BAR = 1 / 1.5
EPS = 1e-6
Operation = Callable[..., tuple[Tensor, Tensor]]


def gated_residual_norm(shape: tuple[int, int, int] = SHAPE) -> Comparison:
    """Return forward and backward; the op in its fastest form may take two thirds of eager."""

    def build(load: Load) -> Mapping[str, Call]:
        op = load("core_gates.ops.gated_residual_norm.op").gated_residual_norm
        kernels = load("core_gates.ops").kernels
        generator = torch.Generator().manual_seed(0)
        x, branch, *grads = (torch.randn(shape, generator=generator) for _ in range(4))
        vectors = [torch.rand(shape[-1], generator=generator) for _ in range(3)]
        inputs = [tensor.requires_grad_() for tensor in (x, branch, *vectors)]

        def in_mode(mode: str) -> Operation:
            def call(*arguments: Tensor) -> tuple[Tensor, Tensor]:
                with kernels(mode):
                    return cast(tuple[Tensor, Tensor], op(*arguments, EPS))

            return call

        def gradients(function: Operation) -> Call:
            return lambda: torch.autograd.grad(function(*inputs), inputs, grads)

        return {
            EAGER: gradients(_eager),
            OURS: gradients(in_mode("reference")),
            COMPILED: gradients(in_mode("compile")),
            CPP: gradients(in_mode("cpp")),
        }

    return Comparison(
        name=f"gate + residual + LayerNorm forward+backward {'x'.join(map(str, shape))}",
        op="gated_residual_norm",
        build=build,
        baseline=EAGER,
        bars={CPP: BAR},
        work=Work(bytes=4.0 * math.prod(shape) * 10),  # reads 2 and 4 arrays, writes 2 and 2
        first_calls=(COMPILED, CPP),
    )


def _eager(
    x: Tensor, branch: Tensor, scores: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + scores * branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, EPS)
