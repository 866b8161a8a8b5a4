"""Adapters of different ranks in one batch: factors padded with zeros, which change nothing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.lora_file import Factors, LoraBundle, LoraFileError
from diffusion.lora_file.family import Placed


class AdapterBatch(NamedTuple):
    """The factors of n adapters, by layer; layers that none of them changes are left out.

    Attributes:
        down: diffusers name -> A (n, r, in_features).
        up: diffusers name -> scale · B (n, out_features, r).
        present: (n, M) whether each fused layer of the encoder is changed.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    present: Tensor

    def rows(self, index: Tensor) -> "AdapterBatch":
        """Return some adapters, in the order of ``index``."""
        return AdapterBatch(
            {name: factor[index] for name, factor in self.down.items()},
            {name: factor[index] for name, factor in self.up.items()},
            self.present[index],
        )

    def like(self, like: Tensor) -> "AdapterBatch":
        """Return the batch with the dtype and on the device of a tensor."""
        return AdapterBatch(
            {name: factor.to(like) for name, factor in self.down.items()},
            {name: factor.to(like) for name, factor in self.up.items()},
            self.present.to(like.device),
        )


def collate(
    bundles: Sequence[LoraBundle],
    modules: Sequence[Placed],
    dtype: torch.dtype = torch.float32,
) -> AdapterBatch:
    """Put adapters into one batch.

    Of a DoRA adapter the direction is taken. A layer whose change is zero counts as unchanged.

    Args:
        bundles: The adapters; layers of them that ``modules`` lacks are ignored.
        modules: Fused layers that the encoder reads.
        dtype: Of the result.

    Raises:
        LoraFileError: A factor has another size, or is not finite.
    """
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    present = torch.zeros(len(bundles), len(modules), dtype=torch.bool)
    for number, module in enumerate(modules):
        for part, outputs in zip(module.parts, module.sizes, strict=True):
            found = {
                row: _checked(bundle.modules[part], part, module.in_features, outputs, dtype)
                for row, bundle in enumerate(bundles)
                if part in bundle.modules
            }
            found = {row: pair for row, pair in found.items() if pair[0].any() and pair[1].any()}
            if not found:
                continue
            rank = max(len(pair[0]) for pair in found.values())
            down[part] = torch.zeros(len(bundles), rank, module.in_features, dtype=dtype)
            up[part] = torch.zeros(len(bundles), outputs, rank, dtype=dtype)
            for row, (a, b) in found.items():
                down[part][row, : len(a)] = a
                up[part][row, :, : len(a)] = b
                present[row, number] = True
    return AdapterBatch(down, up, present)


def _checked(
    factors: Factors, name: str, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return A and scale · B of a layer.

    Raises:
        LoraFileError: A factor has another size, or is not finite.
    """
    if (factors.in_features, factors.out_features) != (inputs, outputs):
        raise LoraFileError(
            f"{name} is {factors.in_features} → {factors.out_features}, expected {inputs} → "
            f"{outputs}: give an adapter of the base that the encoder was trained for"
        )
    down, up = factors.down.to(dtype), factors.up.to(dtype) * factors.scale
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise LoraFileError(f"{name} is not finite; get the file again")
    return down, up
