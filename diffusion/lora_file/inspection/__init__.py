"""What a file of adapters holds: layers, norms, hashes, and what its metadata tell."""

from diffusion.lora_file.inspection.blocks import block_of, relative_errors, sums_of_squares
from diffusion.lora_file.inspection.contents import Contents, Layer, examine
from diffusion.lora_file.inspection.description import Description, describe

__all__ = [
    "Contents",
    "Description",
    "Layer",
    "block_of",
    "describe",
    "examine",
    "relative_errors",
    "sums_of_squares",
]
