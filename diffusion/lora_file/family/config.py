"""The layers of a model, from the configuration that lies in its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.lora_file.container import clean, parse_json
from diffusion.lora_file.errors import FamilyError
from diffusion.lora_file.family.flux import FluxShape
from diffusion.lora_file.family.sd3 import SD3Shape

_CLASS = "_class_name"
_FLUX, _SD3 = "FluxTransformer2DModel", "SD3Transformer2DModel"
_COMMON = {
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "context_dim": "joint_attention_dim",
    "pooled_dim": "pooled_projection_dim",
}
_PLACES = ("transformer/config.json", "config.json")
_MAX_BYTES = 2**20
_EMBEDDED = "gatesuite embedded base"


def modules_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the linear layers of the model in a folder; no weight is read.

    Args:
        folder: Of a pipeline of diffusers, of its transformer, or of an embedded base.

    Returns:
        diffusers name to inputs and outputs.

    Raises:
        FamilyError: There is no configuration, or it is that of another model.
        ContainerError: The configuration is damaged.
    """
    return shape_in(folder).modules()


def shape_in(folder: Path) -> FluxShape | SD3Shape:
    """Return the shape of the model in a folder; no weight is read.

    Args:
        folder: As of :func:`modules_in`.

    Raises:
        FamilyError: There is no configuration, or it is that of another model.
        ContainerError: The configuration is damaged.
    """
    content, source = _config(folder)
    if content.get("kind") == _EMBEDDED:
        shape = content.get("transformer")
        content = {_CLASS: _FLUX, **(shape if isinstance(shape, dict) else {})}
    return shape_of(content, source)


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the configuration of a model, and what it is."""
    for place in (folder / name for name in _PLACES):
        if not place.is_file():
            continue
        with place.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        source = clean(str(place), 200)
        if len(raw) > _MAX_BYTES:
            raise FamilyError(f"{source} is larger than the limit of {_MAX_BYTES} bytes")
        return parse_json(raw, source), source
    label = clean(str(folder), 200)
    raise FamilyError(f"{label} holds no model of diffusers: expected {' or '.join(_PLACES)} in it")


def shape_of(config: Mapping[str, Any], source: str) -> FluxShape | SD3Shape:
    """Return the shape of a transformer of diffusers.

    Args:
        config: Content of ``config.json`` of a ``FluxTransformer2DModel`` or
            ``SD3Transformer2DModel``.
        source: What it is, for messages.

    Raises:
        FamilyError: It is of another class, or a number is missing.
    """
    kind = config.get(_CLASS)
    if kind not in (_FLUX, _SD3):
        raise FamilyError(f"{source} is of class {kind!r}, expected {_FLUX} or {_SD3}")
    numbers = {name: _number(config, key, source) for name, key in _COMMON.items()}
    if kind == _SD3:
        dual = config.get("dual_attention_layers") or ()
        return SD3Shape(
            **numbers,
            out_channels=_number(config, "out_channels", source),
            patch_size=_number(config, "patch_size", source),
            dual_attention=tuple(int(index) for index in dual),
        )
    channels = _number(config, "in_channels", source)
    given = config.get("out_channels")
    side = config.get("patch_size") or 1
    return FluxShape(
        **numbers,
        num_single_layers=_number(config, "num_single_layers", source),
        in_channels=channels,
        out_channels=side**2 * (channels if given is None else int(given)),
        guidance=bool(config.get("guidance_embeds")),
    )


def _number(config: Mapping[str, Any], key: str, source: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise FamilyError(f"{source}: {key} is {value!r}, expected a positive integer")
    return value
