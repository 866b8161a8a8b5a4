"""Families of models: the names and sizes of their linear layers, derived from a few numbers."""

from diffusion.lora_file.family.config import modules_in, shape_in
from diffusion.lora_file.family.flux import FLUX, FluxShape
from diffusion.lora_file.family.layers import (
    Family,
    FusedLayer,
    Placed,
    template_of,
)
from diffusion.lora_file.family.recognition import recognize
from diffusion.lora_file.family.sd3 import SD3, SD3Shape

FAMILIES = {family.name: family for family in (FLUX, SD3)}

__all__ = [
    "FAMILIES",
    "FLUX",
    "SD3",
    "Family",
    "FluxShape",
    "FusedLayer",
    "Placed",
    "SD3Shape",
    "modules_in",
    "recognize",
    "shape_in",
    "template_of",
]
