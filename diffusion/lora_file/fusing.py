"""Layers that read the same input, fused into one and split again, without a change of ΔW."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.adapters.low_rank import side_by_side
from diffusion.lora_file.errors import LoraFileError
from diffusion.lora_file.factors.change import Factors


def own_components(up: Tensor, sizes: Sequence[int]) -> list[Tensor | None]:
    """Return which components each part of a fused layer needs.

    Args:
        up: B (sum of sizes, r) of a fused layer.
        sizes: Outputs of each part.

    Returns:
        Per part the indices of its columns of B, if no two parts share one. Otherwise None, for all
        of them, or no indices for a part whose rows are zero while those of others are not.
    """
    used = torch.stack([part.ne(0).any(0) for part in up.split(list(sizes))])
    if (used.sum(0) <= 1).all() and used.any():
        return [row.nonzero()[:, 0] for row in used]
    nothing = torch.empty(0, dtype=torch.int64)
    return [None if row.any() or not used.any() else nothing for row in used]


def split(
    factors: Factors, sizes: Sequence[int], components: Sequence[Tensor | None] | None = None
) -> list[Factors]:
    """Return the factors of the parts of a fused layer.

    Args:
        factors: Of the fused layer.
        sizes: Outputs of each part.
        components: See :func:`own_components`; None if all parts share A.

    Raises:
        LoraFileError: A DoRA adapter holds norms of columns.
    """
    if len(sizes) == 1:
        return [factors]
    parts, start = [], 0
    for number, size in enumerate(sizes):
        part = factors.rows(start, start + size)
        own = None if components is None else components[number]
        if own is not None:
            part = part._replace(down=part.down[own], up=part.up[:, own])
        parts.append(part)
        start += size
    return parts


def fuse(parts: Sequence[Factors | None], sizes: Sequence[int]) -> Factors:
    """Return the factors of a fused layer.

    Where all parts have the same A it is shared; else A is stacked, B becomes block-diagonal and
    the ranks add up.

    Args:
        parts: Factors of each part; None for one that is not changed.
        sizes: Outputs of each part.

    Raises:
        LoraFileError: Only some parts are DoRA adapters, or they hold norms of columns.
    """
    given = [part for part in parts if part is not None]
    if len(parts) == 1 and given:
        return given[0]
    magnitude = _magnitude(parts)
    pairs = [None if part is None else part.low_rank() for part in parts]
    down, up, scale, _ = side_by_side(pairs, sizes)
    return Factors(down, up, scale, magnitude)


def _magnitude(parts: Sequence[Factors | None]) -> Tensor | None:
    found = [None if part is None else part.magnitude for part in parts]
    given = [magnitude for magnitude in found if magnitude is not None]
    if not given:
        return None
    if len(given) < len(parts) or any(magnitude.shape[1] != 1 for magnitude in given):
        raise LoraFileError(
            "a fused layer can be a DoRA adapter only if all of its parts are, with norms of rows"
        )
    return torch.cat(given)
