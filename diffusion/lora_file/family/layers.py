"""The linear layers of a family, as templates of names with sizes in widths of the model."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Widths = int | tuple[int, ...] | None
"""A size as multiple of the width d, as one of several multiples, or free (an embedder's input)."""

_INDEX = re.compile(r"((?:blocks|layers|block)[._])(0|[1-9]\d{0,3})(?=[._])")


class FusedLayer(NamedTuple):
    """A linear layer as published checkpoints fuse it: the outputs of its parts, one after another.

    Attributes:
        name: Template of its name, as the published encoder orders it.
        type: Layers of one type share a projection in the encoder.
        parts: Templates of the diffusers names whose rows it holds.
    """

    name: str
    type: str
    parts: tuple[str, ...]


class Placed(NamedTuple):
    """A fused layer of a model of known size.

    Attributes:
        name: Such as ``blocks.0.attn.a_to_qkv``.
        type: Such as ``attn.a_to_qkv``.
        parts: diffusers names of its parts.
        in_features: Inputs.
        sizes: Outputs of each part.
    """

    name: str
    type: str
    parts: tuple[str, ...]
    in_features: int
    sizes: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """Outputs of the fused layer."""
        return sum(self.sizes)


class Family(NamedTuple):
    """What the models of a family have in common.

    Attributes:
        name: Such as ``flux``.
        layers: Template of a diffusers name to inputs and outputs.
        fused: What published checkpoints fuse; all other layers are alone.
    """

    name: str
    layers: Mapping[str, tuple[Widths, Widths]]
    fused: tuple[FusedLayer, ...]

    def width(self, shapes: Mapping[str, tuple[int, int]]) -> int | None:
        """Infer the width of the model that most of the given layers agree on.

        Args:
            shapes: diffusers name to inputs and outputs.
        """
        votes: Counter[int] = Counter()
        for name, sizes in shapes.items():
            for size, factor in zip(sizes, self.layers.get(template_of(name), ()), strict=False):
                if isinstance(factor, int) and size % factor == 0:
                    votes[size // factor] += 1
        return min(votes, key=lambda width: (-votes[width], width)) if votes else None

    def out_features(self, name: str, width: int) -> int | None:
        """Return the outputs of a layer in a model of a width; None if the name does not decide."""
        factor = self.layers[template_of(name)][1]
        return factor * width if isinstance(factor, int) else None

    def misfits(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Return what was expected of each layer whose shape contradicts the other layers.

        Args:
            shapes: diffusers name to inputs and outputs.
        """
        width = self.width(shapes)
        found: dict[str, str] = {}
        for name, sizes in shapes.items():
            factors = self.layers.get(template_of(name))
            if factors is None or width is None:
                continue
            wanted = [_options(factor, width) for factor in factors]
            if any(w is not None and size not in w for size, w in zip(sizes, wanted, strict=True)):
                found[name] = " → ".join("any" if w is None else _either(w) for w in wanted)
        return found


def template_of(name: str) -> str:
    """Return a name with ``{i}`` in place of its first block number."""
    return _INDEX.sub(r"\g<1>{i}", name, count=1)


def index_of(name: str) -> int | None:
    """Return the first block number of a name."""
    match = _INDEX.search(name)
    return int(match[2]) if match else None


def expand(layers: Iterable[str], list_name: str, count: int) -> list[str]:
    """Return the names of the layers of all blocks of a list, block by block."""
    own = [name for name in layers if name.startswith(f"{list_name}.{{i}}.")]
    return [name.format(i=i) for i in range(count) for name in own]


def fused_layers(
    layers: dict[str, tuple[str, ...]], ours: str, theirs: str
) -> tuple[FusedLayer, ...]:
    """Return the fused layers of a block of list ``theirs``, named as in list ``ours``."""
    return tuple(
        FusedLayer(f"{ours}.{{i}}.{kind}", kind, tuple(f"{theirs}.{{i}}.{part}" for part in parts))
        for kind, parts in layers.items()
    )


def resolve(
    family: Family, names: list[str], width: int, free: dict[str, int]
) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of layers, where ``free`` gives the sizes that no width decides."""

    def size(name: str, factor: Widths) -> int:
        return factor * width if isinstance(factor, int) else free[name]

    factors = {name: family.layers[template_of(name)] for name in names}
    return {name: (size(name, i), size(name, o)) for name, (i, o) in factors.items()}


def place(
    family: Family, counts: dict[str, int], modules: dict[str, tuple[int, int]]
) -> list[Placed]:
    """Return the fused layers of a model, whose parts lie in ``modules``.

    Args:
        family: Gives the layers of one block.
        counts: Number of blocks, by the first part of the fused names.
        modules: diffusers name to inputs and outputs; parts that it lacks are left out.
    """
    placed = []
    for prefix, count in counts.items():
        own = [layer for layer in family.fused if layer.name.startswith(f"{prefix}.")]
        for i in range(count):
            for layer in own:
                parts = [part.format(i=i) for part in layer.parts]
                parts = [part for part in parts if part in modules]
                if parts:
                    sizes = tuple(modules[part][1] for part in parts)
                    name = layer.name.format(i=i)
                    inputs = modules[parts[0]][0]
                    placed.append(Placed(name, layer.type, tuple(parts), inputs, sizes))
    return placed


def _options(factor: Widths, width: int) -> tuple[int, ...] | None:
    if factor is None:
        return None
    return tuple(f * width for f in (factor if isinstance(factor, tuple) else (factor,)))


def _either(sizes: tuple[int, ...]) -> str:
    return " or ".join(map(str, sizes))
