"""Safetensors files: the header is parsed and checked by hand before any tensor is read."""

from diffusion.lora_file.container.header import LIMITS, Header, Limits, TensorEntry, parse_header
from diffusion.lora_file.container.source import SafetensorsFile
from diffusion.lora_file.container.strict_json import parse_json
from diffusion.lora_file.container.text import clean
from diffusion.lora_file.container.writing import serialize

__all__ = [
    "LIMITS",
    "Header",
    "Limits",
    "SafetensorsFile",
    "TensorEntry",
    "clean",
    "parse_header",
    "parse_json",
    "serialize",
]
