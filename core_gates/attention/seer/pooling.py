"""Pooling of queries and keys over blocks of tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("max", "min", "avg")


def parse_pooling(name: str) -> tuple[str, ...]:
    """Return the kinds in a name such as ``maxminavg``.

    Raises:
        ValueError: The name is not made of ``max``, ``min`` and ``avg``, in this order.
    """
    kinds = tuple(kind for kind in KINDS if kind in name)
    if not kinds or "".join(kinds) != name:
        raise ValueError(f"pooling must join some of max, min, avg in this order, got {name!r}")
    return kinds


def pool_blocks(
    x: Tensor, block_size: int, kinds: tuple[str, ...], *, padding_mask: Tensor | None = None
) -> Tensor:
    """Pool the tokens of every block and join the kinds of pooling along the features.

    Averages are over the tokens that a block has: the last one may be short, and padding is no
    token. A block of nothing but padding is pooled to 0.

    Args:
        x: Tokens (B, T, H, D).
        block_size: Tokens of a block.
        kinds: Some of ``max``, ``min``, ``avg``.
        padding_mask: True (B, T) at tokens to ignore, whatever they hold.

    Returns:
        Pooled (B, ceil(T / block_size), H, D * number of kinds).
    """
    if padding_mask is not None:
        return _pool_tokens(x, block_size, kinds, padding_mask)
    whole = x.shape[1] // block_size * block_size
    blocks = (x.shape[0], whole // block_size, block_size, *x.shape[2:])
    parts = [x[:, :whole].reshape(blocks)]
    if whole < x.shape[1]:
        parts.append(x[:, whole:].unsqueeze(1))
    reduce: dict[str, Callable[[Tensor, int], Tensor]] = {
        "max": Tensor.amax,
        "min": Tensor.amin,
        "avg": Tensor.mean,
    }
    return torch.cat(
        [torch.cat([reduce[kind](part, 2) for kind in kinds], -1) for part in parts], 1
    )


def pad_to_blocks(padding_mask: Tensor, block_size: int) -> Tensor:
    """Cut a mask (B, T) into blocks (B, ceil(T / block_size), block_size), True where none is."""
    padded = F.pad(padding_mask, (0, -padding_mask.shape[1] % block_size), value=True)
    return padded.reshape(len(padded), padded.shape[1] // block_size, block_size)


def _pool_tokens(
    x: Tensor, block_size: int, kinds: tuple[str, ...], padding_mask: Tensor
) -> Tensor:
    ignored = pad_to_blocks(padding_mask, block_size)
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block_size))
    blocks = x.reshape(*ignored.shape, *x.shape[2:])
    number = (~ignored).sum(2)[..., None, None]
    ignored = ignored[..., None, None]
    pooled = {
        "max": lambda: blocks.masked_fill(ignored, -torch.inf).amax(2).masked_fill(number == 0, 0),
        "min": lambda: blocks.masked_fill(ignored, torch.inf).amin(2).masked_fill(number == 0, 0),
        "avg": lambda: blocks.masked_fill(ignored, 0).sum(2) / number.clamp(min=1),
    }
    return torch.cat([pooled[kind]() for kind in kinds], -1)
