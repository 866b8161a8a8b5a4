"""Adapters merged into one by their weights alone, or with gates folded in."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_option
from core_gates.numerics import accumulation_dtype
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.protocol import (
    Fusion,
    family_of,
    linear_sizes,
    modules_of,
    one_family,
    plain_factors,
    refuse_misfits,
    stacked,
    with_strengths,
)
from diffusion.lora_file import Factors, LoraBundle, shrink


def combine(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    kind: str,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the weighted sum of tensors, of which only a part of the entries is kept.

    Args:
        tensors: Of one shape, one per adapter.
        weights: One per adapter.
        kind: ``linear`` keeps all entries; ``magnitude_prune`` and ``ties`` the largest,
            ``dare_linear`` and ``dare_ties`` random ones, divided by the density (Yu et al., 2024).
            The ``ties`` elect a sign for each entry, that of the unweighted sum, and average the
            entries that have it (Yadav et al., 2023).
        density: Fraction of the entries that is kept.
        generator: Where random numbers come from.
    """
    given, floors = list(tensors), [0.0] * len(tensors)
    if kind.startswith("dare") and density < 1:
        stack = torch.stack(given)
        chances = torch.full(stack.shape, density, dtype=stack.dtype)
        drawn = torch.bernoulli(chances, generator=generator).to(stack.device)
        given = list(stack * drawn / density)
    elif kind != "linear" and density < 1:
        floors = [_smallest_kept(delta, density) for delta in given]
    made, axes = torch.empty_like(given[0]), [1] * given[0].ndim
    factors = torch.as_tensor(weights, dtype=made.dtype, device=made.device).view(-1, *axes)
    step = max(1, CHUNK // max(1, made[0].numel()))
    for start in range(0, len(made), step):  # what fits into a cache is several times faster
        parts = [delta[start : start + step] for delta in given]
        kept = torch.stack([o * (o.abs() >= f) for o, f in zip(parts, floors, strict=True)])
        if kind.endswith("ties"):
            agrees = torch.where(kept.sum(0) >= 0, kept > 0, kept < 0).to(kept.dtype)
            total = (kept * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        else:
            total = (kept * factors).sum(0)
        made[start : start + step] = total
    return made


def _smallest_kept(tensor: Tensor, density: float) -> float:
    """Return the smallest magnitude among the largest entries of a tensor, by their fraction."""
    sizes = tensor.abs().flatten().cpu().numpy()
    place = len(sizes) - int(density * len(sizes))
    return float(np.partition(sizes, place)[place]) if place < len(sizes) else math.inf


CHUNK = 2**14  # entries that are combined at a time


def truncate(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the factors (m, r) and (r, n) of the best approximation of a matrix (m, n).

    Matrices that are much larger than the rank are decomposed within the subspace that some power
    iterations find (Halko et al., 2011), which is off by less than a thousandth.

    Args:
        matrix: Such as the changed weight of a layer.
        rank: That of the approximation.
        generator: Where the first subspace comes from.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) > 4 * (width := rank + 16):
        with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            left, sizes, right = torch.svd_lowrank(matrix, width, niter=4)
    else:
        left, sizes, transposed = torch.linalg.svd(matrix, full_matrices=False)
        right = transposed.mT
    roots = sizes[:rank].sqrt()
    return left[:, :rank] * roots, (right[:, :rank] * roots).mT


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
        method: One of `METHODS`.
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
        by_name = plain_factors(adapters, module)
        factors, own = list(by_name.values()), [float(given[name]) for name in by_name]
        if method == "cat" or len(adapters) == 1:
            modules[module] = stacked(factors, own)
        elif method == "svd":
            modules[module] = shrink(stacked(factors, own), rank).factors
        else:
            ranks = [f"{factors.rank} in {name!r}" for name, factors in by_name.items()]
            if method in ON_FACTORS and len({factor.rank for factor in factors}) > 1:
                raise GatesError(
                    f"{method} needs equal ranks, but {module} has {', '.join(ranks)}: use cat, svd"
                    " or a method with _svd, or shrink the adapters to one rank"
                )
            modules[module] = _combined(factors, own, method, density, rank, generator)
    return LoraBundle(family, modules)


def _combined(
    factors: Sequence[Factors],
    weights: Sequence[float],
    method: str,
    density: float,
    rank: int,
    generator: torch.Generator,
) -> Factors:
    """Return the factors of a layer whose A and B, or whose ΔW, are combined."""
    dtype, kind = accumulation_dtype(*(f.up for f in factors)), method.removesuffix("_svd")
    given = [Factors(f.down.to(dtype), f.up.to(dtype), f.scale) for f in factors]
    if kind != method:
        changes = [f.delta_weight() for f in given]
        up, down = truncate(combine(changes, weights, kind, density, generator), rank, generator)
        return Factors(down, up, kernel=factors[0].kernel)
    both = [weight * factor.scale for weight, factor in zip(weights, given, strict=True)]
    roots = [math.sqrt(abs(value)) for value in both]
    signed = [math.copysign(root, value) for root, value in zip(roots, both, strict=True)]
    down = combine([f.down for f in given], signed, kind, density, generator)
    up = combine([f.up for f in given], roots, kind, density, generator)
    return Factors(down, up, kernel=factors[0].kernel)


Merge = Callable[[Mapping[str, LoraBundle], Mapping[str, float]], LoraBundle]
"""Makes one adapter of those whose strength is not 0, and their strengths."""


class Merged(Fusion, nn.Module):
    """One static adapter made of several.

    Args:
        model: See `diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        merge: Called for the adapters, and again when they or their strengths change.

    Attributes:
        bundle: The adapter that is in force.

    Raises:
        GatesError: An adapter does not fit the model, or they cannot be merged.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraBundle], merge: Merge) -> None:
        super().__init__()
        self._merge = merge
        self._fusion, self._attached = GatedFusion(model, {}, mode="sum"), False
        self._use(dict(adapters), dict.fromkeys(adapters, 1.0))

    @property
    def model(self) -> nn.Module:
        """The model; it is not a part of this module."""
        return self._fusion.model

    @property
    def attached(self) -> bool:
        """Whether the adapter is in force, also one that changes nothing."""
        return self._attached

    def attach(self) -> Self:
        """Apply the merged adapter to the model, until `detach`.

        Raises:
            GatesError: It is, or the model has others.
        """
        if self._attached:
            raise GatesError("the model has adapters already, those of this: detach them first")
        self._fusion.attach()
        self._attached = True
        return self

    def detach(self) -> None:
        """Leave the model with its own layers, the same objects with the same bits."""
        self._fusion.detach()
        self._attached = False

    def set_adapters(self, adapters: Mapping[str, LoraBundle]) -> None:
        """Merge other adapters; strengths are 1 again.

        Raises:
            GatesError: One does not fit the model, or they cannot be merged; the old ones stay.
        """
        self._use(dict(adapters), dict.fromkeys(adapters, 1.0))

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Merge with other strengths; adapters with strength 0 are left out.

        Raises:
            GatesError: There is no adapter of a name, or a strength is not finite.
        """
        self._use(self.adapters, with_strengths(self.strengths, strengths))

    def _use(self, adapters: dict[str, LoraBundle], strengths: dict[str, float]) -> None:
        on = {name: strength for name, strength in strengths.items() if strength != 0}
        if self._attached:
            self._fusion.detach()
        try:
            refuse_misfits(adapters, family_of(self.model), linear_sizes(self.model))
            bundle = LoraBundle(one_family(adapters), {})
            if on:
                bundle = self._merge({name: adapters[name] for name in on}, on)
            made = GatedFusion(self.model, {"merged": bundle}, mode="sum")
            self._fusion, self.bundle = made, bundle
            self.adapters, self.strengths = adapters, strengths
        finally:
            if self._attached:
                self._fusion.attach()
