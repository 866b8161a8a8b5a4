"""Matmuls of the C++ mode: by oneDNN where it is faster than the BLAS of PyTorch.

MKL, with which PyTorch for x86 multiplies, has code for AVX-512 that it runs on processors of Intel
alone: others get that of AVX2, half as fast as what oneDNN compiles for them. Both come with
PyTorch; only rounding differs.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_WORK = 2**20
"""Multiplications of a product below which the overhead of oneDNN shows."""

_ops: Any = torch.ops


@functools.cache
def is_faster() -> bool:
    """Return whether oneDNN is the faster library on this processor."""
    libraries: Any = torch.backends
    if not (libraries.mkl.is_available() and libraries.mkldnn.is_available()):
        return False
    if not hasattr(_ops.mkldnn, "_linear_pointwise") or not Path("/proc/cpuinfo").is_file():
        return False
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "avx512f" in facts and "GenuineIntel" not in facts


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, *, cpp: bool) -> Tensor:
    """Return the product (N, M) of matrices (N, K) and (K, M), of any strides.

    Args:
        left: First factor, float32 on the CPU.
        right: Second factor.
        bias: Added to every row (M,).
        cpp: Whether the op runs in the C++ mode.
    """
    if cpp and _pays(left, right):
        if not (right.is_contiguous() or right.mT.is_contiguous()):
            right = right.contiguous()  # for rows with gaps oneDNN has a slow loop alone
        found: Tensor = _ops.mkldnn._linear_pointwise(left, right.mT, bias, "none", [], "")
        return found
    return left @ right if bias is None else torch.addmm(bias, left, right)


def products(
    left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None, *, cpp: bool
) -> None:
    """Write the products (E, N, M) of stacked matrices (E, N, K) and (E, K, M).

    Args:
        left: First factors.
        right: Second factors.
        out: Where the products go.
        bias: Added to every row of a product (E, M).
        cpp: Whether the op runs in the C++ mode.
    """
    if cpp and _pays(left[0], right[0]):
        biases: Sequence[Tensor | None] = [None] * len(out) if bias is None else list(bias)
        for one, other, summand, result in zip(left, right, biases, out, strict=True):
            result.copy_(product(one, other, summand, cpp=True))
    elif bias is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(bias.unsqueeze(1), left, right, out=out)


def add_products(out: Tensor, left: Tensor, right: Tensor, *, cpp: bool) -> None:
    """Add products of matrices, or of stacked ones, to ``out`` (N, M) or (E, N, M)."""
    if out.ndim == 3 and cpp and _pays(left[0], right[0]):
        for result, one, other in zip(out, left, right, strict=True):
            result.add_(product(one, other, cpp=True))
    elif out.ndim == 3:
        out.baddbmm_(left, right)
    elif cpp and _pays(left, right):
        out.add_(product(left, right, cpp=True))
    else:
        out.addmm_(left, right)


def _pays(left: Tensor, right: Tensor) -> bool:
    """Return whether oneDNN is faster for a product: not if it is small or has few rows."""
    rows = left.shape[0]
    work = rows * right.shape[0] * right.shape[1]
    return work >= LEAST_WORK and rows * work >= 128 * LEAST_WORK and is_faster()
