"""Launching element-wise Triton kernels over tensors of one memory layout."""

from typing import Any

import torch
from torch import Tensor

BLOCK = 1024  # elements per program: 8 a thread at the default of four warps


def in_layout_of(layout: Tensor, tensor: Tensor) -> Tensor:
    """Return ``tensor`` with the strides of ``torch.empty_like(layout)``, copied where they differ.

    Args:
        layout: Tensor whose order of dimensions is wanted.
        tensor: Values of the same shape, any strides and dtype; never written.
    """
    if tensor.stride() == layout.stride():
        return tensor
    return torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)


def launch_elementwise(kernel: Any, first: Tensor, *others: Tensor | float) -> None:
    """Run ``kernel(first, *others, numel, BLOCK)``, one program for each ``BLOCK`` elements.

    All tensors must be dense and have equal strides: the kernel walks memory, not indices.
    """
    numel = first.numel()
    if numel == 0:
        return
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        kernel[(-(-numel // BLOCK),)](first, *others, numel, BLOCK=BLOCK)
