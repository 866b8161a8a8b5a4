"""The definition of ``gated_lora``, a block of tokens at a time.

The full-size output of an adapter exists for the tokens of one block only, in the forward and in
the backward pass, so that memory does not grow with the number of adapters.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core_gates.ops.gated_lora import reference

# Elements of a temporary: a few of them stay in the caches of a core; a GPU needs long blocks.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**17, 2**24


def forward(
    mix: Callable[..., Tensor],
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
    out: Tensor,
) -> Tensor:
    """Write what ``reference.forward`` returns into ``out`` (``base`` itself, too) and return it.

    ``mix`` is that of the reference, perhaps compiled.
    """
    mean, rstd = reference.statistics(hidden, up, ranks, eps)
    size = block_size(base)
    up, coefficients = up.to(mean.dtype), coefficients.to(mean.dtype)
    for start in range(0, len(base), size):
        rows = slice(start, start + size)
        block = [t[rows] for t in (base, hidden, mean, rstd)]
        out[rows] = mix(*block, up, coefficients, ranks, eps)
    return out


def backward(
    mix_backward: Callable[..., tuple[Tensor, ...]],
    grad: Tensor,
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``reference.backward`` returns, by its own or a compiled ``mix_backward``."""
    mean, rstd = reference.statistics(hidden, up, ranks, eps)
    size = block_size(base)
    exact = up.to(mean.dtype), coefficients.to(mean.dtype)
    grad_base, grad_hidden = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (base, hidden)
    )
    grad_up, grad_coefficients = (torch.zeros_like(t) for t in exact)
    for start in range(0, len(base), size):
        rows = slice(start, start + size)
        block = [t[rows] for t in (grad, base, hidden, mean, rstd)]
        of_base, of_hidden, of_up, of_coefficients = mix_backward(*block, *exact, ranks, eps)
        grad_base[rows], grad_hidden[rows] = of_base, of_hidden
        grad_up = grad_up + of_up
        grad_coefficients = grad_coefficients + of_coefficients
    return grad_base, grad_hidden, grad_up.to(up.dtype), grad_coefficients.to(coefficients.dtype)


def block_size(base: Tensor) -> int:
    """Tokens of a block: a power of two, so that most calls consist of equal blocks."""
    elements = _GPU_ELEMENTS if base.is_cuda else _CPU_ELEMENTS
    return 1 << max(0, (elements // base.shape[-1]).bit_length() - 1)
