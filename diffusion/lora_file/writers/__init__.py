"""Write adapters in the dialects that other programs read.

A format is a file with one function from a bundle to a :class:`Layout`; add it to ``FORMATS``.
"""

from collections.abc import Callable

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.writers.checkpoint_names import bfl, comfyui, encoders_of, kohya
from diffusion.lora_file.writers.diffusers_file import LOADED, diffusers_file
from diffusion.lora_file.writers.layout import Layout
from diffusion.lora_file.writers.peft_folder import peft_folder

FORMATS: dict[str, Callable[[LoraBundle], Layout]] = {
    "diffusers": diffusers_file,
    "peft": peft_folder,
    "kohya": kohya,
    "bfl": bfl,
    "comfyui": comfyui,
}
"""Name of a format to the function that lays an adapter out in it."""

__all__ = ["FORMATS", "Layout", "text_encoders"]


def text_encoders(format: str, family: str) -> frozenset[str]:
    """Return the text encoders whose adapters a format can hold next to those of a transformer."""
    return frozenset(LOADED[family] if format == "diffusers" else encoders_of(format, family))
