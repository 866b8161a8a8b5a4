"""Files of low-rank adapters: read in every dialect, checked, converted, shrunk, written."""

from diffusion.lora_file.bundle import FusedView, LoraBundle, shrink, shrink_bundle
from diffusion.lora_file.container import (
    ContainerError,
    FamilyError,
    FormatError,
    Limits,
    LoraFileError,
    SafetensorsFile,
)
from diffusion.lora_file.factors import Factors
from diffusion.lora_file.family import FluxShape, SD3Shape
from diffusion.lora_file.mapping_report import (
    Dialect,
    Fate,
    MappingError,
    MappingReport,
    Verdict,
    verdicts,
)
from diffusion.lora_file.reading import load_lora, recognize_file
from diffusion.lora_file.writing import save_lora

__all__ = [
    "ContainerError",
    "Dialect",
    "Factors",
    "FamilyError",
    "Fate",
    "FluxShape",
    "FormatError",
    "FusedView",
    "Limits",
    "LoraBundle",
    "LoraFileError",
    "MappingError",
    "MappingReport",
    "SD3Shape",
    "SafetensorsFile",
    "Verdict",
    "load_lora",
    "recognize_file",
    "save_lora",
    "shrink",
    "shrink_bundle",
    "verdicts",
]
