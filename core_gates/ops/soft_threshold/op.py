"""The public function ``soft_threshold`` and its registration as a PyTorch operator."""

import torch
from torch import Tensor

from core_gates.errors import check_at_least
from core_gates.ops._select import definition, register, use_kernel
from core_gates.ops.soft_threshold import reference


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """Move every value towards zero by ``threshold`` and stop there.

    This is the proximal map of ``threshold * |x|_1``, so after a gradient step it solves the L1
    problem; values within the threshold become exactly zero (Ding et al., 2023, equation of SoRA).

    Args:
        x: Values, any shape.
        threshold: ξ, not negative.

    Returns:
        ``sign(x) max(|x| - ξ, 0)`` in the shape and dtype of ``x``.

    Raises:
        ValueError: The threshold is negative or NaN.
    """
    check_at_least(0, threshold=threshold)
    function = _forward if use_kernel(x) else definition(reference.forward)
    return function(x, threshold)


_forward = register(reference, lambda x, _threshold: torch.empty_like(x), saved=1)
