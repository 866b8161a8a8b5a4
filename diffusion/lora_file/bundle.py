"""An adapter in canonical form, whatever its dialect: fused, seen fused, or of a lower rank."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.adapters.low_rank import side_by_side
from diffusion.lora_file.container import LoraFileError
from diffusion.lora_file.factors import Factors, Sizes
from diffusion.lora_file.family import FAMILIES, Placed, index_of
from diffusion.lora_file.mapping_report import MappingReport
from diffusion.lora_file.names import UNETS


class Values(NamedTuple):
    """What the values of the factors of a layer show.

    Attributes:
        finite: Whether there is no NaN and no infinity.
        zero: Whether the change of the layer is zero.
    """

    finite: bool
    zero: bool

    @classmethod
    def of(cls, factors: Factors) -> "Values":
        """Return facts on the values of a pair of factors: zero if no component is used by both."""
        tensors = [factors.down, factors.up]
        if factors.magnitude is not None:
            tensors.append(factors.magnitude)
        used = factors.down.ne(0).any(1) & factors.up.ne(0).any(0)
        zero = factors.scale == 0 or not bool(used.any())
        return cls(are_finite(tensors), zero and factors.magnitude is None)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether tensors hold neither NaN nor infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


class Recipe(NamedTuple):
    """How to get the factors of a layer.

    Attributes:
        sizes: Known from the header of the file.
        load: Reads them.
        examine: Reads what the file stores, and returns what is noteworthy about it.
    """

    sizes: Sizes
    load: Callable[[], Factors]
    examine: Callable[[], Values]


class LazyFactors(Mapping[str, Factors]):
    """diffusers name to factors, read from the file at every access.

    Args:
        recipes: By diffusers name.
    """

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self._recipes = dict(sorted(recipes.items()))

    def __getitem__(self, name: str) -> Factors:
        """Read the factors of a layer."""
        return self._recipes[name].load()

    def __iter__(self) -> Iterator[str]:
        """Return the names, sorted."""
        return iter(self._recipes)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._recipes)

    def __contains__(self, name: object) -> bool:
        """Return whether a layer is changed, without reading anything."""
        return name in self._recipes

    def examine(self, name: str) -> Values:
        """Return facts on the values of a layer, without expanding LoHa and LoKr."""
        return self._recipes[name].examine()

    def sizes(self) -> dict[str, Sizes]:
        """Return the sizes of all layers without reading their factors."""
        return {name: recipe.sizes for name, recipe in self._recipes.items()}


@dataclass(frozen=True)
class LoraBundle:
    """The change of every layer of a model, by diffusers name.

    Attributes:
        family: ``flux``, ``sd3``, or another that files are recognized as.
        modules: Layers of the transformer; those of a file are read at every access.
        text_encoders: Such as ``text_encoder_2`` to layers by the names of transformers.
        metadata: Text of the header of the file.
        report: What became of every tensor of the file.
        storage: Dtype of most factors in the file; float32 if there is none.
        name: Stem of the file, or that of its folder where programs call every file alike; empty if
            there is none.
    """

    family: str
    modules: Mapping[str, Factors]
    text_encoders: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    report: MappingReport | None = None
    storage: torch.dtype = torch.float32
    name: str = ""

    def delta_weight(self, module: str, weight: Tensor | None = None) -> Tensor:
        """Return the change (out_features, in_features) added to the weight of a layer.

        Args:
            module: diffusers name.
            weight: Weight of the base, which DoRA needs.

        Raises:
            LoraFileError: The adapter does not change the layer, or needs the weight.
        """
        if module not in self.modules:
            raise LoraFileError(f"the adapter does not change the layer {module}")
        return self.modules[module].delta_weight(weight)

    def sizes(self) -> dict[str, Sizes]:
        """Return the rank, inputs and outputs of each layer of the transformer."""
        if isinstance(self.modules, LazyFactors):
            return self.modules.sizes()
        named = sorted(self.modules.items())
        return {name: Sizes(f.rank, f.in_features, f.out_features) for name, f in named}

    def ranks(self) -> dict[str, int]:
        """Return the rank of each layer of the transformer."""
        return {name: sizes.rank for name, sizes in self.sizes().items()}

    def norms(self) -> dict[str, float]:
        """Return ‖ΔW‖ (Frobenius) of each layer; for DoRA that of the change of the direction."""
        return {name: self.modules[name].norm() for name in self.modules}

    def digest(self) -> str:
        """Return a SHA-256 that does not depend on dialect, metadata or precision of storage.

        It covers names, shapes, scales and the values of all factors in float32.
        """
        digest = hashlib.sha256()
        for component, modules in sorted(
            {"transformer": self.modules, **self.text_encoders}.items()
        ):
            for name in sorted(modules):
                factors = modules[name]
                down, up, scale, magnitude, _ = factors
                shape = (factors.rank, factors.in_features, factors.out_features)
                digest.update(f"{component} {name} {shape} {scale:.9g}\n".encode())
                for tensor in (down, up, *([] if magnitude is None else [magnitude])):
                    digest.update(tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def select(self, names: Iterable[str]) -> "LoraBundle":
        """Return the adapter of some layers of the transformer alone."""
        chosen = {name: self.modules[name] for name in names}
        return dataclasses.replace(self, modules=chosen, text_encoders={})


def own_components(up: Tensor, sizes: Sequence[int]) -> list[Tensor | None]:
    """Return which components each part of a fused layer needs.

    Args:
        up: B (sum of sizes, r) of a fused layer.
        sizes: Outputs of each part.

    Returns:
        Per part the indices of its columns of B, if some belong to one part and the others to none
        or to all. Otherwise None, for all of them, or no indices for a part whose rows are zero
        while those of others are not.
    """
    used = torch.stack([part.ne(0).any(0) for part in up.split(list(sizes))])
    users = used.sum(0)
    if ((users <= 1) | used.all(0)).all() and (users == 1).any():
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
        components: See `own_components`; None if all parts share A.

    Raises:
        LoraFileError: A DoRA adapter holds norms of columns.
    """
    if len(sizes) == 1:
        return [factors]
    parts, start = [], 0
    for number, size in enumerate(sizes):
        part = factors.rows(start, start + size)
        rows = None if components is None else components[number]
        if rows is not None:
            part = part._replace(down=part.down[rows], up=part.up[:, rows])
        parts.append(part)
        start += size
    return parts


def fuse(parts: Sequence[Factors | None], sizes: Sequence[int]) -> Factors:
    """Return the factors of a fused layer.

    Where all parts have the same A it is shared; else A is stacked, B becomes block-diagonal and
    the ranks add up, but for rows that occur in A again, as where a merge has put a fused layer
    next to separate ones: each is kept once.

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
    if len(down) > max(part.rank for part in given):
        once, places = down.unique(dim=0, return_inverse=True)
        if len(once) < len(down):
            down, up = once, up.new_zeros(len(up), len(once)).index_add_(1, places, up)
    return Factors(down, up, scale, magnitude)


def _magnitude(parts: Sequence[Factors | None]) -> Tensor | None:
    magnitudes = [None if part is None else part.magnitude for part in parts]
    given = [magnitude for magnitude in magnitudes if magnitude is not None]
    if not given:
        return None
    if len(given) < len(parts) or any(magnitude.shape[1] != 1 for magnitude in given):
        raise LoraFileError(
            "a fused layer can be a DoRA adapter only if all of its parts are, with norms of rows"
        )
    return torch.cat(given)


class FusedView(Mapping[str, Factors]):
    """Factors of the fused layers that an adapter changes, made at every access.

    Args:
        bundle: The adapter.
        layers: Fused layers of the model; those that follow from the adapter if None.
    """

    def __init__(self, bundle: LoraBundle, layers: list[Placed] | None = None) -> None:
        self._modules = bundle.modules
        placed = layers_of(bundle) if layers is None else layers
        self._layers = {
            layer.name: layer
            for layer in placed
            if any(part in self._modules for part in layer.parts)
        }

    def __getitem__(self, name: str) -> Factors:
        """Return the factors of a fused layer.

        Raises:
            LoraFileError: Only some of its parts are DoRA adapters.
        """
        layer = self._layers[name]
        return fuse([self._modules.get(part) for part in layer.parts], layer.sizes)

    def __iter__(self) -> Iterator[str]:
        """Return the names, in the order of the model."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Return the number of fused layers."""
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        """Return whether a fused layer is changed, without reading anything."""
        return name in self._layers

    def layer(self, name: str) -> Placed:
        """Return the name, type and sizes of a fused layer."""
        return self._layers[name]


def layers_of(bundle: LoraBundle) -> list[Placed]:
    """Return the fused layers that an adapter changes, whose sizes follow from its other layers."""
    family, sizes = FAMILIES[bundle.family], bundle.sizes()
    width = family.width({name: (s.in_features, s.out_features) for name, s in sizes.items()})
    blocks = sorted({index for name in sizes if (index := index_of(name)) is not None})
    placed = []
    for prefix in dict.fromkeys(layer.name.partition(".")[0] for layer in family.fused):
        for block in blocks:
            for layer in family.fused:
                parts = tuple(part.replace("{i}", str(block)) for part in layer.parts)
                sized = [sizes[part] for part in parts if part in sizes]
                if not sized or not layer.name.startswith(f"{prefix}."):
                    continue
                outputs = tuple(
                    sizes[part].out_features
                    if part in sizes
                    else family.out_features(part, width or sized[0].in_features) or 0
                    for part in parts
                )
                name = layer.name.replace("{i}", str(block))
                placed.append(Placed(name, layer.type, parts, sized[0].in_features, outputs))
    return placed


class Shrunk(NamedTuple):
    """A layer of a lower rank.

    Attributes:
        factors: Scale 1, the singular values divided equally between both factors.
        error: ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius).
    """

    factors: Factors
    error: float


PARTS = {
    "flux": {"double": "transformer_blocks", "single": "single_transformer_blocks"},
    "sd3": {"joint": "transformer_blocks"},
    **{unet: {"in": "down_blocks", "mid": "mid_block", "out": "up_blocks"} for unet in UNETS},
}
"""Parts of the models of a family, and what the names of their layers begin with."""


def weighed(bundle: LoraBundle, weights: Mapping[str, float]) -> LoraBundle:
    """Return an adapter whose changes are multiplied by a factor for each part of the model.

    Args:
        bundle: An adapter.
        weights: Keys of `PARTS` of its family to factors; layers of no part stay as they are, and
            those with the factor 0 are left out. A negative factor turns the sign of B, as a scale
            that is not positive is refused when the file is read.
    """
    starts = {f"{PARTS[bundle.family][part]}.": factor for part, factor in weights.items()}
    factors = {
        name: next((f for start, f in starts.items() if name.startswith(start)), 1.0)
        for name in bundle.modules
    }
    modules = {
        name: one._replace(
            up=math.copysign(1.0, factors[name]) * one.up, scale=abs(factors[name]) * one.scale
        )
        for name, one in bundle.modules.items()
        if factors[name]
    }
    return dataclasses.replace(bundle, modules=modules)


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
    result = Factors(new_down.to(dtype), new_up.to(dtype), 1.0, factors.magnitude, factors.kernel)
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
        rank: See `shrink`.
        energy: See `shrink`.
        fused: Whether layers are shrunk together that are one layer in published checkpoints, and
            in the formats with their names; shrunk one by one, their ranks would add up there.

    Returns:
        The adapter, and the relative error of each layer of the transformer.

    Raises:
        LoraFileError: See `shrink`.
    """
    _check(rank, energy)
    if fused:
        shrunk_of = _shrink_fused(bundle, rank, energy)
    else:
        shrunk_of = {name: shrink(bundle.modules[name], rank, energy) for name in bundle.modules}
    encoders = {
        component: {name: shrink(modules[name], rank, energy).factors for name in modules}
        for component, modules in bundle.text_encoders.items()
    }
    modules = {name: shrunk.factors for name, shrunk in shrunk_of.items()}
    result = dataclasses.replace(bundle, modules=modules, text_encoders=encoders)
    return result, {name: shrunk.error for name, shrunk in shrunk_of.items()}


def _shrink_fused(bundle: LoraBundle, rank: int | None, energy: float | None) -> dict[str, Shrunk]:
    """Shrink fused layers; their parts share A then. All others are shrunk one by one."""
    view = FusedView(bundle)
    shrunk: dict[str, Shrunk] = {}
    for fused in view:
        layer = view.layer(fused)
        whole = view[fused]
        small = shrink(whole, rank, energy).factors
        if small is whole:
            continue
        for part, factors in zip(layer.parts, split(small, layer.sizes), strict=True):
            if part in bundle.modules:
                shrunk[part] = Shrunk(factors, _error(bundle.modules[part], factors))
    alone = (name for name in bundle.modules if name not in shrunk)
    shrunk |= {name: shrink(bundle.modules[name], rank, energy) for name in alone}
    return {name: shrunk[name] for name in bundle.modules}


def _error(factors: Factors, other: Factors) -> float:
    """Return ‖ΔW − ΔW'‖ / ‖ΔW‖ of two pairs of factors, without their products."""
    down = torch.cat([factors.down, other.down])
    up = torch.cat([factors.scale * factors.up, -other.scale * other.up], dim=1)
    norm = factors.norm()
    return Factors(down, up).norm() / norm if norm > 0 else 0.0


def _check(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise LoraFileError("nothing says how far to shrink: give a rank or an energy")
    if rank is not None and rank < 1:
        raise LoraFileError(f"--rank is {rank}, expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise LoraFileError(f"--energy is {energy}, expected a fraction in (0, 1]")
