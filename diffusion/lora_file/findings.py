"""Values of factors that are not finite, and layers whose change is zero."""

from typing import NamedTuple

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.lazy import values_of


class Findings(NamedTuple):
    """What the values of an adapter show.

    Attributes:
        nonfinite: Layers with NaN or infinity.
        zero: Layers whose change is zero.
        total: Number of layers.
    """

    nonfinite: tuple[str, ...]
    zero: tuple[str, ...]
    total: int

    @property
    def all_zero(self) -> bool:
        """Whether the adapter changes nothing."""
        return self.total > 0 and len(self.zero) == self.total


def find(bundle: LoraBundle) -> Findings:
    """Read all values once; layers of text encoders are named with their component."""
    nonfinite, zero, total = [], [], 0
    for component, modules in {"": bundle.modules, **bundle.text_encoders}.items():
        for name in modules:
            values, label = values_of(modules, name), f"{component}.{name}" if component else name
            total += 1
            if not values.finite:
                nonfinite.append(label)
            elif values.zero:
                zero.append(label)
    return Findings(tuple(nonfinite), tuple(zero), total)
