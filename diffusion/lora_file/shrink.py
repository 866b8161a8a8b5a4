"""Adapters of a lower rank: the best approximation of ΔW, which is never formed."""

import dataclasses
import math
from typing import NamedTuple

import torch

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.errors import LoraFileError
from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.fusing import split
from diffusion.lora_file.views import FusedView


class Shrunk(NamedTuple):
    """A layer of a lower rank.

    Attributes:
        factors: Scale 1, the singular values divided equally between both factors.
        error: ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius).
    """

    factors: Factors
    error: float


def shrink(factors: Factors, rank: int | None = None, energy: float | None = None) -> Shrunk:
    """Return the best approximation of lower rank (Eckart and Young, 1936).

    QR decompositions of B and Aᵀ leave a core of r × r numbers, whose singular values are those of
    BA. For DoRA it approximates the direction; the magnitudes stay.

    Args:
        factors: Of a layer.
        rank: Components that are kept at most.
        energy: Fraction of ‖ΔW‖² that is kept at least, in (0, 1].

    Raises:
        LoraFileError: ``rank`` or ``energy`` is out of range, or a value is not finite.
    """
    _check(rank, energy)
    up, down = factors.up.double(), factors.down.double()
    if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
        raise LoraFileError("a factor holds NaN or infinity; its rank cannot be lowered")
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    total = s.square().sum()
    kept = min(rank or len(s), len(s))
    if energy is not None and total > 0:
        reached = s.square().cumsum(0) >= energy * total * (1 - 1e-12)
        kept = min(kept, int(reached.int().argmax()) + 1)
    if rank is not None and energy is None and kept >= factors.rank:
        return Shrunk(factors, 0.0)
    root = s[:kept].sqrt()
    size = abs(factors.scale) ** 0.5
    new_up = (left @ u[:, :kept]) * (root * math.copysign(size, factors.scale))
    new_down = (root * size)[:, None] * (right @ vh[:kept].T).T
    error = float((s[kept:].square().sum() / total).sqrt()) if total > 0 else 0.0
    dtype = factors.up.dtype
    result = Factors(new_down.to(dtype), new_up.to(dtype), 1.0, factors.magnitude)
    return Shrunk(result, error)


def shrink_bundle(
    bundle: LoraBundle,
    rank: int | None = None,
    energy: float | None = None,
    *,
    fused: bool = False,
) -> tuple[LoraBundle, dict[str, float]]:
    """Shrink every layer, those of text encoders included.

    Args:
        bundle: An adapter.
        rank: See :func:`shrink`.
        energy: See :func:`shrink`.
        fused: Whether layers are shrunk together that are one layer in published checkpoints, and
            in the formats with their names; shrunk one by one, their ranks would add up there.

    Returns:
        The adapter, and the relative error of each layer of the transformer.

    Raises:
        LoraFileError: See :func:`shrink`.
    """
    _check(rank, energy)
    if fused:
        own = _shrink_fused(bundle, rank, energy)
    else:
        own = {name: shrink(bundle.modules[name], rank, energy) for name in bundle.modules}
    encoders = {
        component: {name: shrink(modules[name], rank, energy).factors for name in modules}
        for component, modules in bundle.text_encoders.items()
    }
    modules = {name: shrunk.factors for name, shrunk in own.items()}
    result = dataclasses.replace(bundle, modules=modules, text_encoders=encoders)
    return result, {name: shrunk.error for name, shrunk in own.items()}


def _shrink_fused(bundle: LoraBundle, rank: int | None, energy: float | None) -> dict[str, Shrunk]:
    """Shrink fused layers; their parts share A then. All others are shrunk one by one."""
    view = FusedView(bundle)
    found: dict[str, Shrunk] = {}
    for fused in view:
        layer = view.layer(fused)
        whole = view[fused]
        small = shrink(whole, rank, energy).factors
        if small is whole:
            continue
        for part, factors in zip(layer.parts, split(small, layer.sizes), strict=True):
            if part in bundle.modules:
                found[part] = Shrunk(factors, _error(bundle.modules[part], factors))
    alone = (name for name in bundle.modules if name not in found)
    found |= {name: shrink(bundle.modules[name], rank, energy) for name in alone}
    return {name: found[name] for name in bundle.modules}


def _error(one: Factors, other: Factors) -> float:
    """Return ‖ΔW − ΔW'‖ / ‖ΔW‖ of two pairs of factors, without their products."""
    down = torch.cat([one.down, other.down])
    up = torch.cat([one.scale * one.up, -other.scale * other.up], dim=1)
    norm = one.norm()
    return Factors(down, up).norm() / norm if norm > 0 else 0.0


def _check(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise LoraFileError("nothing says how far to shrink: give a rank or an energy")
    if rank is not None and rank < 1:
        raise LoraFileError(f"rank is {rank}, expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise LoraFileError(f"energy is {energy}, expected a fraction in (0, 1]")
