"""Values of factors that are not finite, and layers whose change is zero."""

from typing import NamedTuple

import torch

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.factors.change import Factors


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
    """Read all factors once; layers of text encoders are named with their component."""
    nonfinite, zero, total = [], [], 0
    for component, modules in {"": bundle.modules, **bundle.text_encoders}.items():
        for name in modules:
            factors, label = modules[name], f"{component}.{name}" if component else name
            total += 1
            if not _is_finite(factors):
                nonfinite.append(label)
            elif _is_zero(factors):
                zero.append(label)
    return Findings(tuple(nonfinite), tuple(zero), total)


def _is_finite(factors: Factors) -> bool:
    tensors = [factors.down, factors.up]
    if factors.magnitude is not None:
        tensors.append(factors.magnitude)
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _is_zero(factors: Factors) -> bool:
    """Return whether BA is zero: a factor is, or no component is used by both."""
    if factors.magnitude is not None:
        return False
    used = factors.down.ne(0).any(1) & factors.up.ne(0).any(0)
    return factors.scale == 0 or not bool(used.any())
