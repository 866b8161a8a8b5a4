"""Pooling of queries and keys over blocks of tokens."""

from collections.abc import Callable

import torch
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


def pool_blocks(x: Tensor, block_size: int, kinds: tuple[str, ...]) -> Tensor:
    """Pool the tokens of every block and join the kinds of pooling along the features.

    The last block may be short; its average is over the tokens that it has.

    Args:
        x: Tokens (B, T, H, D).
        block_size: Tokens of a block.
        kinds: Some of ``max``, ``min``, ``avg``.

    Returns:
        Pooled (B, ceil(T / block_size), H, D * number of kinds).
    """
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
