"""Adapters merged into one by their weights alone, or with gates folded in."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_option
from core_gates.numerics import accumulation_dtype
from diffusion.fusion.baking import MeanGates, bake
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.protocol import (
    Attachable,
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
    if kind.startswith("dare"):
        tensors = [_drop(tensor, density, generator) for tensor in tensors]
    elif kind != "linear":
        tensors = [_keep_largest(tensor, density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    factors = torch.as_tensor(weights, dtype=stacked.dtype, device=stacked.device)
    weighted = stacked * factors.view(-1, *[1] * (stacked.ndim - 1))
    if not kind.endswith("ties"):
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view_as(tensor)


def _drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    if density >= 1:
        return tensor
    chances = torch.full(tensor.shape, density, dtype=tensor.dtype)
    return tensor * torch.bernoulli(chances, generator=generator).to(tensor.device) / density


def truncate(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the factors (m, r) and (r, n) of the best approximation of a matrix (m, n).

    Large matrices are decomposed within the subspace that some power iterations find (Halko et
    al., 2011).

    Args:
        matrix: Such as the changed weight of a layer.
        rank: That of the approximation.
        generator: Where the first subspace comes from.
    """
    rank = min(rank, *matrix.shape)
    basis, core = None, matrix
    if min(matrix.shape) > LARGE:
        start = torch.randn(matrix.shape[1], rank + 16, dtype=matrix.dtype, generator=generator)
        basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
        for _ in range(6):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        core = basis.T @ matrix
    left, sizes, right = torch.linalg.svd(core, full_matrices=False)
    roots = sizes[:rank].sqrt()
    left = left[:, :rank] if basis is None else basis @ left[:, :rank]
    return left * roots, roots[:, None] * right[:rank]


LARGE = 1024  # matrices with more rows and columns are decomposed by iterations


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


Merge = Callable[[Mapping[str, LoraBundle], Mapping[str, float]], LoraBundle]
"""Makes one adapter of those whose strength is not 0, and their strengths."""


class Merged(Attachable, nn.Module):
    """One static adapter made of several.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
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
        """Put the adapter in force.

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

    def at(self, step: int, steps: int) -> None:
        """Nothing changes from one step to the next."""

    def _use(self, adapters: dict[str, LoraBundle], strengths: dict[str, float]) -> None:
        if self._attached:
            self._fusion.detach()
        try:
            bundle = self._merged(adapters, strengths)
            made = GatedFusion(self.model, {"merged": bundle}, mode="sum")
        except BaseException:
            if self._attached:
                self._fusion.attach()
            raise
        self._fusion, self.bundle = made, bundle
        self.adapters, self.strengths = adapters, strengths
        if self._attached:
            self._fusion.attach()

    def _merged(
        self, adapters: Mapping[str, LoraBundle], strengths: Mapping[str, float]
    ) -> LoraBundle:
        refuse_misfits(adapters, family_of(self.model), linear_sizes(self.model))
        on = {name: bundle for name, bundle in adapters.items() if strengths[name] != 0}
        if not on:
            return LoraBundle(one_family(adapters), {})
        return self._merge(on, {name: strengths[name] for name in on})


class Baked(Merged):
    """Use the mean of the gates of some runs as if gates did not depend on the input.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        observe: Runs the model on inputs whose gates are averaged, with gates in force.
        gates: File of trained gates.
        options: Further options of :class:`diffusion.fusion.GatedFusion`.

    Raises:
        GatesError: An adapter or the gates do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, LoraBundle],
        *,
        observe: Callable[[], object],
        gates: str | Path | None = None,
        **options: Any,
    ) -> None:
        def merge(on: Mapping[str, LoraBundle], strengths: Mapping[str, float]) -> LoraBundle:
            fusion = GatedFusion(model, on, gates=gates, **options)
            fusion.set_strengths(strengths)
            with fusion, MeanGates(fusion) as observed:
                observe()
            return bake(fusion, observed.means)

        super().__init__(model, adapters, merge)
