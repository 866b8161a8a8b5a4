"""The public function ``gate_multiply`` and its registration as a PyTorch operator."""

import torch
from torch import Tensor

from core_gates.ops._select import definition, register, use_kernel
from core_gates.ops.gate_multiply import reference


def gate_multiply(x: Tensor, logits: Tensor) -> Tensor:
    """Return ``x * sigmoid(logits)``, fused where a kernel is chosen.

    Args:
        x: Values to gate, any shape.
        logits: Gate logits of the same shape; the dtype may differ.

    Returns:
        The gated values in the dtype of ``x``.

    Raises:
        ValueError: The shapes differ.
    """
    if x.shape != logits.shape:
        raise ValueError(f"x {tuple(x.shape)} and logits {tuple(logits.shape)} must have one shape")
    return (_forward if use_kernel(x, logits) else definition(reference.forward))(x, logits)


_forward = register(reference, lambda x, _logits: torch.empty_like(x), saved=2)
