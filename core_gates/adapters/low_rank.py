"""The factors of a plain low-rank adapter."""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from core_gates.routing.repeated import probing

ROWS = 512
"""Inputs at a time of which the weight of a layer of any kind is read."""


class LowRank(NamedTuple):
    """A LoRA of one linear layer: it adds ``scale * up @ down`` to the weight (Hu et al., 2022).

    With a magnitude it is a DoRA (Liu et al., 2024): the rows of the weight, with this added, get
    the magnitude as their norm.

    Attributes:
        down: First factor A (r, in_features).
        up: Second factor B (out_features, r).
        scale: α/r, or α/√r for rank-stabilized adapters.
        magnitude: Norms of the rows of the weight (out_features,); NaN leaves a row as it is, None
            all of them.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of components r."""
        return self.down.shape[0]

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return what the adapter adds to the weight (out_features, in_features).

        Args:
            weight: That of the layer, which an adapter with a magnitude needs.

        Raises:
            ValueError: There is a magnitude, but no weight.
        """
        delta = self.scale * (self.up @ self.down)
        if self.magnitude is None:
            return delta
        if weight is None:
            raise ValueError("an adapter with a magnitude changes a weight by its rows: give it")
        return self.row_gains(weight).unsqueeze(-1) * (weight + delta) - weight

    def row_gains(self, weight: Tensor) -> Tensor:
        """Return the factors (out_features,) of the rows of the changed weight."""
        assert self.magnitude is not None
        changed = torch.addmm(weight.to(self.up.dtype), self.up, self.down, alpha=self.scale)
        norms = torch.linalg.vector_norm(changed, dim=-1)
        gains = self.magnitude / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        return torch.where(self.magnitude.isnan(), torch.ones_like(gains), gains)

    def check(self, in_features: int, out_features: int) -> None:
        """Refuse factors that do not belong to a layer of these sizes or to each other.

        Raises:
            ValueError: A shape does not fit.
        """
        rank = self.down.shape[0]
        if self.down.shape != (rank, in_features) or self.up.shape != (out_features, rank):
            raise ValueError(
                f"factors {tuple(self.down.shape)} and {tuple(self.up.shape)} do not fit a layer of"
                f" {in_features} inputs and {out_features} outputs: expected (r, {in_features}) and"
                f" ({out_features}, r)"
            )
        if self.magnitude is not None and self.magnitude.shape != (out_features,):
            raise ValueError(
                f"magnitude {tuple(self.magnitude.shape)} does not fit a layer of {out_features}"
                f" outputs: expected ({out_features},)"
            )


def side_by_side(parts: Sequence[LowRank | None], sizes: Sequence[int]) -> LowRank:
    """Return one adapter of layers that share their input, for their outputs side by side.

    Args:
        parts: The adapter of each layer, None where it has none. Where all have the same ``down``,
            the rank stays; else ranks add up and ``up`` is block-diagonal. A scale that all have
            stays, too.
        sizes: Outputs of each layer.

    Raises:
        ValueError: No layer has an adapter, or factors do not fit.
    """
    given = [part for part in parts if part is not None]
    if not given:
        raise ValueError("none of the layers has factors of this adapter")
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            part.check(given[0].down.shape[1], size)
    first = given[0].down
    shared = all(part.down is first or torch.equal(part.down, first) for part in given)
    down = first if shared else torch.cat([part.down for part in given])
    scale = given[0].scale if len({part.scale for part in given}) == 1 else 1.0
    rows, start = [], 0
    for part, size in zip(parts, sizes, strict=True):
        row = given[0].up.new_zeros(size, len(down))
        if part is not None:
            begin = 0 if shared else start
            up = part.up if part.scale == scale else part.scale / scale * part.up
            row[:, begin : begin + part.rank] = up
            start += part.rank
        rows.append(row)
    magnitude = None
    if any(part.magnitude is not None for part in given):
        magnitude = torch.cat(
            [
                rows[k].new_full((size,), math.nan)
                if part is None or part.magnitude is None
                else part.magnitude
                for k, (part, size) in enumerate(zip(parts, sizes, strict=True))
            ]
        )
    return LowRank(down, torch.cat(rows), scale, magnitude)


def is_unwatched(layer: nn.Module) -> bool:
    """Return whether nothing but its caller sees the outputs of a plain linear layer."""
    hooks = layer._forward_hooks or nn.modules.module._global_forward_hooks
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not hooks


@torch.no_grad()
def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight (out_features, in_features) of a linear layer of any kind.

    What any other than a plain ``nn.Linear`` computes with is read from its outputs for unit
    vectors, in evaluation mode and without a trace of the calls.

    Args:
        layer: A module with ``in_features``.

    Raises:
        ValueError: It has no memory, or is not called with inputs alone, or is not linear but for a
            bias.
    """
    name, tensors = type(layer).__name__, [*layer.parameters(), *layer.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"{name} is on the device meta, where an adapter with a magnitude (DoRA) finds no"
            " weight: attach it after loading"
        )
    weight, hooks = getattr(layer, "weight", None), layer._forward_hooks or layer._forward_pre_hooks
    if type(layer) is nn.Linear and type(weight) in (Tensor, nn.Parameter) and not hooks:
        stored = cast(Tensor, weight).detach()
        if stored.is_floating_point():
            return stored
    device = tensors[0].device if tensors else torch.device("cpu")
    wide = (t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1)
    dtype, size = next(wide, torch.get_default_dtype()), int(layer.in_features)  # type: ignore[arg-type]
    units = torch.eye(size, device=device, dtype=dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    x = 8 * torch.randn(2, size, generator=generator, device="cpu").to(units)
    try:
        with probing(layer, device):
            bias, y = layer(units.new_zeros(1, size)), layer(x)
            found = torch.cat([layer(rows) - bias for rows in torch.split(units, ROWS)])
    except Exception as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        raise ValueError(f"{name} cannot be called with inputs (N, {size}): {reason}") from failure
    eps, linear = torch.finfo(y.dtype).eps, x @ found
    error, least, most = (t.float().norm() for t in (y - bias - linear, linear, y))
    if not error <= least / 4 + 16 * eps * most:  # inputs may be rounded to few bits
        raise ValueError(
            f"{name} does not compute a weight times its input plus a bias, which an adapter with a"
            " magnitude (DoRA) needs: give it the linear layer alone"
        )
    return found.mT.contiguous()


def bias_of(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Return the bias (..., out_features) of a linear layer of any kind, as it is at this call.

    That of any other than a plain ``nn.Linear`` is its output for zeros, whatever its name.

    Args:
        layer: The layer.
        x: Inputs (..., in_features) of it.
    """
    if is_unwatched(layer) and not layer._forward_pre_hooks:
        return cast(Tensor | None, layer.bias)
    return cast(Tensor, layer(x.new_zeros(*[1] * (x.ndim - 1), x.shape[-1])))
