"""How a file stores the change of one layer: pairs of factors, and formulas that reduce to a pair.

A kind of factors is a file with one :class:`Kind`. To add one, write it and list it here.
"""

from diffusion.lora_file.factors.dora import magnitude_matrix, magnitude_shape, merged_weight
from diffusion.lora_file.factors.kind import Kind, Pair, Sizes
from diffusion.lora_file.factors.loha import LOHA
from diffusion.lora_file.factors.lokr import LOKR
from diffusion.lora_file.factors.plain import PLAIN
from diffusion.lora_file.factors.spellings import Spelled, spell, unsupported

KINDS = (PLAIN, LOHA, LOKR)

__all__ = [
    "KINDS",
    "Kind",
    "Pair",
    "Sizes",
    "Spelled",
    "magnitude_matrix",
    "magnitude_shape",
    "merged_weight",
    "spell",
    "unsupported",
]
