"""Merges by weights as PEFT defines them, from files to one static adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from core_gates.errors import GatesError, check_option
from core_gates.numerics import accumulation_dtype
from diffusion.fusion.stacking import modules_of, one_family, plain_factors, stacked
from diffusion.lora_file import Factors, LoraBundle, shrink
from diffusion.rivals.merging.tasks import combine, truncate

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_CHANGES = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = ("cat", "svd", *ON_FACTORS, *ON_CHANGES)


def merge(
    adapters: Mapping[str, LoraBundle],
    weights: Mapping[str, float] | None = None,
    method: str = "cat",
    *,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> LoraBundle:
    """Merge adapters as ``add_weighted_adapter`` of PEFT does.

    ``cat`` puts factors side by side and is exact. ``svd`` is its best approximation of a rank; no
    ΔW is formed for it. Methods without ``_svd`` combine A and B separately, each with the root of
    weight and scale, the sign at A: what A of one adapter and B of another yield together is an
    error that these methods accept. Methods with ``_svd`` combine ΔW, which they form one layer at
    a time, and approximate the result. A single adapter is weighed alone, whatever the method, and
    a layer that only some adapters change is merged from those. What DARE drops is drawn once from
    the seed. Parts for text encoders are left out.

    Args:
        adapters: Name -> adapter.
        weights: Name -> factor; 1 for all by default. Zero still takes part in elections of signs.
        method: One of :data:`METHODS`.
        density: Fraction of the entries that is kept by all but ``cat``, ``svd`` and ``linear``.
        rank: That of ``svd`` and of the methods with ``_svd``; the largest of all by default.
        seed: Of the random numbers.

    Raises:
        GatesError: An option is wrong, adapters do not fit each other, or ranks differ where
            factors are combined.
    """
    check_option("method", method, METHODS, GatesError)
    if not 0 < density <= 1:
        raise GatesError(f"density is {density}, expected a fraction above 0, at most 1")
    if rank is not None and rank < 1:
        raise GatesError(f"rank is {rank}, expected 1 or more")
    family, generator = one_family(adapters), torch.Generator().manual_seed(seed)
    given = dict.fromkeys(adapters, 1.0) if weights is None else weights
    if rank is None:
        rank = max((r for bundle in adapters.values() for r in bundle.ranks().values()), default=1)
    modules = {}
    for module in modules_of(adapters):
        found = plain_factors(adapters, module)
        factors, own = list(found.values()), [float(given[name]) for name in found]
        if method == "cat" or len(adapters) == 1:
            modules[module] = stacked(factors, own)
        elif method == "svd":
            modules[module] = shrink(stacked(factors, own), rank).factors
        elif method in ON_FACTORS:
            _refuse_ranks(found, module, method)
            modules[module] = _on_factors(factors, own, method, density, generator)
        else:
            kind = method.removesuffix("_svd")
            modules[module] = _on_changes(factors, own, kind, density, rank, generator)
    return LoraBundle(family, modules)


def _refuse_ranks(found: Mapping[str, Factors], module: str, method: str) -> None:
    if len({factors.rank for factors in found.values()}) > 1:
        ranks = ", ".join(f"{factors.rank} in {name!r}" for name, factors in found.items())
        raise GatesError(
            f"{method} needs equal ranks, but {module} has {ranks}: use cat, svd or a method with"
            " _svd, or shrink the adapters to one rank"
        )


def _on_factors(
    factors: Sequence[Factors],
    weights: Sequence[float],
    kind: str,
    density: float,
    generator: torch.Generator,
) -> Factors:
    dtype = accumulation_dtype(*(f.up for f in factors))
    both = [weight * one.scale for weight, one in zip(weights, factors, strict=True)]
    roots = [math.sqrt(abs(value)) for value in both]
    signed = [math.copysign(root, value) for root, value in zip(roots, both, strict=True)]
    down = combine([f.down.to(dtype) for f in factors], signed, kind, density, generator)
    up = combine([f.up.to(dtype) for f in factors], roots, kind, density, generator)
    return Factors(down, up)


def _on_changes(
    factors: Sequence[Factors],
    weights: Sequence[float],
    kind: str,
    density: float,
    rank: int,
    generator: torch.Generator,
) -> Factors:
    dtype = accumulation_dtype(*(f.up for f in factors))
    changes = [Factors(f.down.to(dtype), f.up.to(dtype), f.scale).delta_weight() for f in factors]
    up, down = truncate(combine(changes, weights, kind, density, generator), rank, generator)
    return Factors(down, up)
