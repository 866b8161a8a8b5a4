"""The format of diffusers: PEFT's names after the name of the network, settings in the header."""

import json
from typing import Any

from torch import Tensor

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.scales import HEADER_KEY
from diffusion.lora_file.writers.layout import Layout, kept_metadata, refuse
from diffusion.lora_file.writers.peft_settings import settings_of, tensors_of

LOADED = {"flux": {"text_encoder"}, "sd3": {"text_encoder", "text_encoder_2"}}
"""Text encoders whose adapters ``load_lora_weights`` reads."""


def diffusers_file(bundle: LoraBundle) -> Layout:
    """Lay an adapter out for ``load_lora_weights`` of diffusers 0.34 or newer.

    Raises:
        FormatError: A text encoder is not read by diffusers, or only some layers are DoRA adapters.
    """
    ignored = [
        f"{component}.{name}"
        for component, modules in bundle.text_encoders.items()
        if component not in LOADED[bundle.family]
        for name in modules
    ]
    refuse("diffusers", ignored, f"diffusers reads no adapters of it for {bundle.family}")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, modules in {"transformer": bundle.modules, **bundle.text_encoders}.items():
        if modules:
            tensors |= tensors_of(modules, f"{component}.", "diffusers")
            own = settings_of(modules)
            settings |= {f"{component}.{key}": value for key, value in own.items()}
    metadata = kept_metadata(bundle.metadata)
    metadata[HEADER_KEY] = json.dumps(settings, sort_keys=True)
    return Layout(tensors, metadata)
