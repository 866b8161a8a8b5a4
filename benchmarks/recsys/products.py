"""The matmuls of a call, recorded while it runs and then run alone: what it must at least take."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
_OPERANDS = {
    _aten.mm.default: 0,
    _aten.mm.out: 0,
    _aten.bmm.default: 0,
    _aten.bmm.out: 0,
    _aten.addmm.default: 1,
    _aten.addmm.out: 1,
    _aten.addmm_.default: 1,
    _aten.baddbmm.default: 1,
    _aten.baddbmm.out: 1,
    _aten.baddbmm_.default: 1,
}
"""Operators that multiply matrices, and the position of the first factor."""

_ONE_DNN = "mkldnn::_linear_pointwise"
"""Operator of oneDNN, whose factors are the first two arguments, the second one transposed."""


class Layout(NamedTuple):
    """Shape and strides of a factor, transposed or not, as the product was called."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """Return the layout of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride())


class Product(NamedTuple):
    """A matmul of two matrices, or of two batches of matrices.

    Attributes:
        left: First factor.
        right: Second factor.
        one_dnn: Whether oneDNN computes it.
    """

    left: Layout
    right: Layout
    one_dnn: bool = False


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _OPERANDS:
            first = _OPERANDS[func]
            self.products.append(Product(Layout.of(args[first]), Layout.of(args[first + 1])))
        elif func.name() == _ONE_DNN:
            left, right = Layout.of(args[0]), Layout.of(args[1].mT)
            self.products.append(Product(left, right, one_dnn=True))
        return func(*args, **(kwargs or {}))


def products_of(call: Callable[[], object]) -> list[Product]:
    """Return the matmuls of a call in their order, those of its backward pass included."""
    with _Recorder() as recorder:
        call()
    return recorder.products


def alone(products: list[Product]) -> Callable[[], object]:
    """Return a call of nothing but these products, with factors in memory of the same layout.

    Products of one layout share their memory, which is warmer than that of a network: what they
    take is rather less than what they take within the call.
    """
    memory: dict[tuple[Layout, int], Tensor] = {}

    def factor(layout: Layout, side: int) -> Tensor:
        if (layout, side) not in memory:
            steps = zip(layout.shape, layout.strides, strict=True)
            size = 1 + sum((length - 1) * step for length, step in steps)
            flat = torch.rand(max(size, 1))
            memory[layout, side] = flat.as_strided(layout.shape, layout.strides)
        return memory[layout, side]

    results: dict[tuple[int, ...], Tensor] = {}
    calls: list[Callable[[], object]] = []
    for product in products:
        left, right = factor(product.left, 0), factor(product.right, 1)
        if product.one_dnn:
            options: tuple[Any, ...] = (None, "none", [], "")
            call = partial(torch.ops.mkldnn._linear_pointwise, left, right.mT, *options)
            calls.append(call)
        else:
            shape = (*product.left.shape[:-1], product.right.shape[-1])
            out = results.setdefault(shape, torch.empty(shape))
            multiply = torch.mm if left.ndim == 2 else torch.bmm
            calls.append(partial(multiply, left, right, out=out))

    def run() -> None:
        with torch.no_grad():
            for one in calls:
                one()

    return run
