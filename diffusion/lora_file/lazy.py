"""Factors that are read when they are asked for, with sizes that are known before."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.factors.kind import Sizes


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
        """Return what a pair of factors shows; it is zero if no component is used by both."""
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
        """Return what the values of a layer show, without expanding LoHa and LoKr."""
        return self._recipes[name].examine()

    def sizes(self) -> dict[str, Sizes]:
        """Return the sizes of all layers without reading their factors."""
        return {name: recipe.sizes for name, recipe in self._recipes.items()}


def values_of(modules: Mapping[str, Factors], name: str) -> Values:
    """Return what the values of a layer show."""
    if isinstance(modules, LazyFactors):
        return modules.examine(name)
    return Values.of(modules[name])


def sizes_of(modules: Mapping[str, Factors]) -> dict[str, Sizes]:
    """Return the sizes of the factors of each layer."""
    if isinstance(modules, LazyFactors):
        return modules.sizes()
    return {
        name: Sizes(f.rank, f.in_features, f.out_features) for name, f in sorted(modules.items())
    }
