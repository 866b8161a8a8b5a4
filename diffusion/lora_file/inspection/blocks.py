"""Figures of layers, summed up over the blocks of a model."""

import math
from collections.abc import Mapping

from diffusion.lora_file.family.layers import index_of

OUTSIDE = "outside of the blocks"


def block_of(name: str) -> str:
    """Return the block that a layer belongs to, such as ``transformer_blocks.3``."""
    if index_of(name) is None:
        return OUTSIDE
    kind, number, _ = name.split(".", 2)
    return f"{kind}.{number}"


def blocks_of(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the layers of each block, in the order of the model; those outside come last."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(block_of(name), []).append(name)
    return dict(sorted(blocks.items(), key=lambda item: _place(item[0])))


def sums_of_squares(values: Mapping[str, float]) -> dict[str, float]:
    """Return the root of the sum of squares of each block.

    Args:
        values: Norm of each layer, by diffusers name.
    """
    return {
        block: math.sqrt(sum(values[name] ** 2 for name in names))
        for block, names in blocks_of(values).items()
    }


def relative_errors(errors: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    """Return ‖ΔW − ΔW'‖ / ‖ΔW‖ of each block.

    Args:
        errors: Relative error of each layer, by diffusers name.
        norms: ‖ΔW‖ of each layer.
    """
    lost = sums_of_squares({name: errors[name] * norms[name] for name in errors})
    total = sums_of_squares({name: norms[name] for name in errors})
    return {block: lost[block] / norm if norm else 0.0 for block, norm in total.items()}


def _place(block: str) -> tuple[int, int]:
    """Sort double blocks before single ones, and both before the layers outside."""
    kind, _, number = block.partition(".")
    if block == OUTSIDE:
        return 2, 0
    return int(kind.startswith("single")), int(number)
