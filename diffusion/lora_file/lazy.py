"""Factors that are read when they are asked for, with sizes that are known before."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.factors.kind import Sizes


class Recipe(NamedTuple):
    """How to get the factors of a layer.

    Attributes:
        sizes: Known from the header of the file.
        load: Reads them.
    """

    sizes: Sizes
    load: Callable[[], Factors]


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

    def sizes(self) -> dict[str, Sizes]:
        """Return the sizes of all layers without reading their factors."""
        return {name: recipe.sizes for name, recipe in self._recipes.items()}


def sizes_of(modules: Mapping[str, Factors]) -> dict[str, Sizes]:
    """Return the sizes of the factors of each layer."""
    if isinstance(modules, LazyFactors):
        return modules.sizes()
    return {
        name: Sizes(f.rank, f.in_features, f.out_features) for name, f in sorted(modules.items())
    }
