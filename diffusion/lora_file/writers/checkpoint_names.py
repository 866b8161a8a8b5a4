"""Formats with the names of a family's own checkpoints: kohya's, ComfyUI's and the plain one."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.errors import LoraFileError
from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.factors.kind import Sizes
from diffusion.lora_file.family import FAMILIES
from diffusion.lora_file.family.layers import index_of
from diffusion.lora_file.fusing import fuse
from diffusion.lora_file.names import NameTable
from diffusion.lora_file.names.bfl_flux import BFL_FLUX
from diffusion.lora_file.names.native_sd3 import NATIVE_SD3
from diffusion.lora_file.writers.layout import (
    Layout,
    alpha_of,
    kept_metadata,
    most_common,
    refuse,
)

_NATIVE: dict[str, NameTable] = {"flux": BFL_FLUX, "sd3": NATIVE_SD3}


class _Style(NamedTuple):
    """How a format spells names.

    Attributes:
        name: Of the format.
        prefix: Before the layers of the transformer.
        encoders: Family to text encoder to what comes before its layers.
        down: Spelling of A.
        up: Spelling of B.
        underscored: Whether underscores replace the dots of layers.
        alpha: Whether α is stored; otherwise the scale is multiplied into B.
    """

    name: str
    prefix: str
    encoders: Mapping[str, Mapping[str, str]]
    down: str
    up: str
    underscored: bool
    alpha: bool = True


_KOHYA = _Style(
    "kohya",
    "lora_unet_",
    {
        "flux": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
        "sd3": {
            "text_encoder": "lora_te1_",
            "text_encoder_2": "lora_te2_",
            "text_encoder_3": "lora_te3_",
        },
    },
    "lora_down",
    "lora_up",
    True,
)
_CLIP_L, _CLIP_G, _T5 = (
    f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")
)
_COMFYUI = _Style(
    "comfyui",
    "diffusion_model.",
    {
        "flux": {"text_encoder": _CLIP_L, "text_encoder_2": _T5},
        "sd3": {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5},
    },
    "lora_A",
    "lora_B",
    False,
)
_BFL = _Style("bfl", "", {}, "lora_A", "lora_B", False, alpha=False)
_STYLES = {style.name: style for style in (_KOHYA, _COMFYUI, _BFL)}


def encoders_of(format: str, family: str) -> Mapping[str, str]:
    """Return the text encoders that a format has names for, each with its prefix."""
    return _STYLES[format].encoders.get(family, {}) if format in _STYLES else {}


def kohya(bundle: LoraBundle) -> Layout:
    """Lay an adapter out as kohya's trainers do; every program that knows the family reads it.

    Raises:
        FormatError: Only some parts of a fused layer are DoRA adapters.
    """
    layout = _layout(bundle, _KOHYA)
    metadata = layout.metadata | {
        "ss_network_module": f"networks.lora_{bundle.family}",
        "ss_network_dim": f"{most_common(bundle.ranks().values()):.0f}" if bundle.modules else "0",
    }
    return layout._replace(metadata=metadata)


def comfyui(bundle: LoraBundle) -> Layout:
    """Lay an adapter out with the names of the family's own checkpoints, as ComfyUI reads them.

    Raises:
        FormatError: Only some parts of a fused layer are DoRA adapters.
    """
    return _layout(bundle, _COMFYUI)


def bfl(bundle: LoraBundle) -> Layout:
    """Lay an adapter for FLUX.1 out as Black Forest Labs do, with names that have no prefix.

    Raises:
        FormatError: It is for another family, has parts for text encoders, or only some parts of a
            fused layer are DoRA adapters.
    """
    if bundle.family != "flux":
        refuse("bfl", sorted(bundle.modules), "it has names for the layers of FLUX.1 alone")
    return _layout(bundle, _BFL)


def _layout(bundle: LoraBundle, style: _Style) -> Layout:
    layers = {style.prefix + _spelled(n, style): f for n, f in _native(bundle, style).items()}
    for component, modules in bundle.text_encoders.items():
        prefix = encoders_of(style.name, bundle.family).get(component)
        if prefix is None:
            refuse(style.name, [f"{component}.{n}" for n in modules], "it has no name for them")
            continue
        layers |= {prefix + _spelled(name, style): modules[name] for name in modules}
    tensors: dict[str, Tensor] = {}
    exact = set()
    for name, factors in layers.items():
        tensors[f"{name}.{style.down}.weight"] = factors.down
        scaled = factors.up if style.alpha else factors.scale * factors.up
        tensors[f"{name}.{style.up}.weight"] = scaled
        if style.alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha_of(factors), dtype=torch.float32)
            exact.add(f"{name}.alpha")
        if factors.magnitude is not None:
            tensors[f"{name}.dora_scale"] = factors.magnitude
    return Layout(tensors, kept_metadata(bundle.metadata), exact=frozenset(exact))


def _spelled(name: str, style: _Style) -> str:
    return name.replace(".", "_") if style.underscored else name


def _native(bundle: LoraBundle, style: _Style) -> dict[str, Factors]:
    """Return the factors under the names of the family's own checkpoints.

    Raises:
        FormatError: A layer has no such name, or its parts cannot be fused.
    """
    sizes = bundle.sizes()
    blocks = sorted({index for name in sizes if (index := index_of(name)) is not None})
    layers: dict[str, Factors] = {}
    left, unfusable = set(sizes), []
    for templates, (native, swapped) in _NATIVE[bundle.family].inverse().items():
        for block in blocks if "{i}" in native else [0]:
            parts = [template.replace("{i}", str(block)) for template in templates]
            if not left.intersection(parts):
                continue
            left -= set(parts)
            try:
                factors = _fused(bundle, parts, sizes)
            except LoraFileError:
                unfusable += [part for part in parts if part in sizes]
                continue
            last = swapped == "last" and factors.out_features == 2 * factors.in_features
            exchanged = swapped == "always" or last
            name = native.replace("{i}", str(block))
            layers[name] = factors.swapped() if exchanged else factors
    refuse(style.name, sorted(left), "it has no name for them")
    refuse(style.name, unfusable, "they are one layer there, of which all or no parts are DoRA")
    return layers


def _fused(bundle: LoraBundle, parts: list[str], sizes: Mapping[str, Sizes]) -> Factors:
    family = FAMILIES[bundle.family]
    inputs = next(sizes[part].in_features for part in parts if part in sizes)
    outputs = [
        sizes[part].out_features if part in sizes else family.out_features(part, inputs) or 0
        for part in parts
    ]
    return fuse([bundle.modules.get(part) for part in parts], outputs)
