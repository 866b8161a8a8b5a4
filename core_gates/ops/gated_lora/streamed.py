"""The definition of ``gated_lora``, a block of tokens at a time.

The full-size output of an adapter exists for the tokens of one block only, in the forward and in
the backward pass, so that memory does not grow with the number of adapters.
"""

from collections.abc import Callable, Iterator, Sequence

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
    up, coefficients = up.to(mean.dtype), coefficients.to(mean.dtype)
    for rows, group in _blocks(base, coefficients):
        block = [t[rows] for t in (base, hidden, mean, rstd)]
        out[rows] = mix(*block, up, coefficients[group], ranks, eps)
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
    exact = up.to(mean.dtype), coefficients.to(mean.dtype)
    grad_base, grad_hidden = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (base, hidden)
    )
    grad_up = torch.zeros_like(exact[0])
    sums = [torch.zeros_like(like) for like in exact[1].reshape(-1, *exact[1].shape[-2:])]
    for rows, group in _blocks(base, coefficients):
        block = [t[rows] for t in (grad, base, hidden, mean, rstd)]
        gradients = mix_backward(*block, exact[0], exact[1][group], ranks, eps)
        grad_base[rows], grad_hidden[rows] = gradients[:2]
        grad_up = grad_up + gradients[2]
        number = group if isinstance(group, int) else 0
        sums[number] = sums[number] + gradients[3]
    shared = torch.stack(sums) if sums else torch.zeros_like(exact[1])
    shared = shared.view(coefficients.shape)
    return grad_base, grad_hidden, grad_up.to(up.dtype), shared.to(coefficients.dtype)


def _blocks(base: Tensor, coefficients: Tensor) -> Iterator[tuple[slice, int | slice]]:
    """Return rows of tokens, and which coefficients are theirs."""
    size, group = block_size(base), group_size(base, coefficients)
    for first in range(0, len(base), group):
        end = min(first + group, len(base))
        row = slice(None) if coefficients.ndim == 2 else first // group
        for start in range(first, end, size):
            yield slice(start, min(start + size, end)), row


def group_size(base: Tensor, coefficients: Tensor) -> int:
    """Return how many tokens (N, D) in a row share the coefficients (5, D) or (groups, 5, D)."""
    groups = 1 if coefficients.ndim == 2 else len(coefficients)
    return max(1, len(base) // max(1, groups))


def block_size(base: Tensor) -> int:
    """Tokens of a block: a power of two, so that most calls consist of equal blocks."""
    elements = _GPU_ELEMENTS if base.is_cuda else _CPU_ELEMENTS
    return 1 << max(0, (elements // base.shape[-1]).bit_length() - 1)
