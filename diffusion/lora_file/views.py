"""An adapter as seen by the published encoder and gates: with its layers fused."""

from collections.abc import Iterator, Mapping

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.family import FAMILIES, Placed
from diffusion.lora_file.family.layers import index_of
from diffusion.lora_file.fusing import fuse


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
                known = [sizes[part] for part in parts if part in sizes]
                if not known or not layer.name.startswith(f"{prefix}."):
                    continue
                outputs = tuple(
                    sizes[part].out_features
                    if part in sizes
                    else family.out_features(part, width or known[0].in_features) or 0
                    for part in parts
                )
                name = layer.name.replace("{i}", str(block))
                placed.append(Placed(name, layer.type, parts, known[0].in_features, outputs))
    return placed
