"""The public function ``silu_gate`` and its registration as a PyTorch operator."""

import torch
from torch import Tensor

from core_gates.ops._select import definition, register, use_kernel
from core_gates.ops.silu_gate import reference


def silu_gate(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gate an activated signal and return it with the gate, fused where a kernel is chosen.

    The gated convolution needs both: ``o = silu(a) * sigmoid(g)`` is its output stream and
    ``sigmoid(g)`` its next confidence stream. Both results are differentiable.

    Args:
        a: Signal before its activation, any shape.
        g: Gate logits of the same shape; the dtype may differ.

    Returns:
        ``silu(a) * sigmoid(g)`` in the dtype of ``a`` and ``sigmoid(g)`` in the dtype of ``g``.

    Raises:
        ValueError: The shapes differ.
    """
    if a.shape != g.shape:
        raise ValueError(f"a {tuple(a.shape)} and g {tuple(g.shape)} must have one shape")
    return (_forward if use_kernel(a, g) else definition(reference.forward))(a, g)


_forward = register(reference, lambda a, g: (torch.empty_like(a), torch.empty_like(g)), saved=2)
