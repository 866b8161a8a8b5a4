"""The ops of the core against their plain definition and against ``torch.compile``."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.comparison import Call, Comparison, Load, Work

SHAPES = {"cpu": (4, 64, 8, 32, 64), "cuda": (8, 192, 13, 46, 90)}


def on_cpu() -> Iterator[Comparison]:
    """Those of a CPU, though there is a GPU."""
    return comparisons("cpu")


def comparisons(device: str | None = None) -> Iterator[Comparison]:
    """Forward, and forward with backward, of every element-wise op; on a GPU if there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[device]
    numel = math.prod(shape)
    for op, outputs in (("silu_gate", 2), ("gate_multiply", 1)):
        for backward in (False, True):
            # Forward reads two arrays; backward reads them and the gradients and writes two.
            arrays = 2 + outputs + (4 + outputs if backward else 0)
            yield Comparison(
                name=f"{op} {'forward+backward' if backward else 'forward'} {_size(shape)}",
                op=op,
                build=_builder(op, shape, device, backward),
                baseline="reference",
                work=Work(bytes=4.0 * numel * arrays),
                first_calls=("compile",),
                memory=4.0 * numel * 12,
            )


def _builder(
    op: str, shape: tuple[int, ...], device: str, backward: bool
) -> Callable[[Load], Mapping[str, Call]]:
    def build(load: Load) -> Mapping[str, Call]:
        function = getattr(load(f"core_gates.ops.{op}.op"), op)
        kernels = load("core_gates.ops").kernels
        generator = torch.Generator(device).manual_seed(0)
        first, second = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        first.requires_grad_(backward)
        second.requires_grad_(backward)
        modes = ["reference", "compile"] + (["triton"] if device == "cuda" else [])

        def variant(mode: str) -> Call:
            def call() -> object:
                with kernels(mode):
                    return _run(function, first, second, backward)

            return call

        return {mode: variant(mode) for mode in modes}

    return build


def _run(function: Callable[..., object], first: Tensor, second: Tensor, backward: bool) -> object:
    if not backward:
        with torch.no_grad():
            return function(first, second)
    result = function(first, second)
    outputs = result if isinstance(result, tuple) else (result,)
    grads = [torch.ones((), device=o.device).expand_as(o) for o in outputs]
    return torch.autograd.grad(outputs, (first, second), grads)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
