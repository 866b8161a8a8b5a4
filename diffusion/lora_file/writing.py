"""Write an adapter in a format of choice: atomically, and with the same bytes every time."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_gates.errors import check_option
from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.container import LIMITS, FormatError, listed, serialize
from diffusion.lora_file.dialects import (
    ENCODERS,
    Layout,
    Style,
    alpha_of,
    in_storage,
    kept_metadata,
    laid_out,
    most_common,
    network_of,
    program_style,
    refuse,
    stored_pair,
)
from diffusion.lora_file.factors import Factors
from diffusion.lora_file.names import TRANSFORMER
from diffusion.lora_file.scales import CONFIG, HEADER_KEY, WEIGHTS
from harness.files.atomic import replacing, write_bytes

_ENDS = {"proj_out"}
"""Names that other layers end with, too: PEFT takes a name for the end of any longer one."""


def tensors_of(modules: Mapping[str, Factors], prefix: str, format_name: str) -> dict[str, Tensor]:
    """Return the tensors of the layers of one network under the names of PEFT.

    Raises:
        FormatError: Only some layers are DoRA adapters, or they hold norms of columns.
    """
    dora = [name for name in modules if modules[name].magnitude is not None]
    if dora:
        others = [name for name in modules if modules[name].magnitude is None]
        refuse(format_name, others, "in PEFT all layers are DoRA adapters or none is")
        columns = [n for n in dora if (m := modules[n].magnitude) is not None and m.shape[1] != 1]
        refuse(format_name, columns, "PEFT's DoRA knows norms of rows only")
    tensors = {}
    for name in modules:
        factors = modules[name]
        down, up = stored_pair(factors)
        tensors[f"{prefix}{name}.lora_A.weight"] = down
        tensors[f"{prefix}{name}.lora_B.weight"] = up
        if factors.magnitude is not None:
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = factors.magnitude[:, 0]
    return tensors


def settings_of(modules: Mapping[str, Factors]) -> dict[str, Any]:
    """Return rank, α and the layers with others, as ``LoraConfig`` takes them."""
    alphas, ranks, dora = {}, {}, False
    for name in modules:
        factors = modules[name]
        alpha = alpha_of(factors)
        ranks[name], alphas[name] = factors.rank, int(alpha) if alpha == int(alpha) else alpha
        dora = dora or factors.magnitude is not None
    rank, alpha = int(most_common(ranks.values())), most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {_anchored(n): a for n, a in alphas.items() if a != alpha},
        "target_modules": _targets(list(modules)),
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
    }


def _anchored(name: str) -> str:
    return f"^{name}" if name in _ENDS else name


def _targets(names: list[str]) -> list[str] | str:
    """Return the names, or a regular expression where one of them is the end of others."""
    if not _ENDS.intersection(names):
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))


def peft_folder(bundle: LoraBundle) -> Layout:
    """Lay an adapter out for ``PeftModel.from_pretrained``.

    Raises:
        FormatError: It has parts for text encoders, or only some layers are DoRA adapters.
    """
    others = [
        f"{component}.{n}" for component, layers in bundle.text_encoders.items() for n in layers
    ]
    refuse("peft", others, "a folder of PEFT holds the adapter of one network")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        **settings_of(bundle.modules),
    }
    tensors = tensors_of(bundle.modules, "base_model.model.", "peft")
    return Layout(tensors, kept_metadata(bundle.metadata), config)


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
        if component not in LOADED.get(bundle.family, ENCODERS)
        for name in modules
    ]
    refuse("diffusers", ignored, f"diffusers reads no adapters of it for {bundle.family}")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    network = network_of(bundle.family)
    for component, modules in {network: bundle.modules, **bundle.text_encoders}.items():
        if modules:
            tensors |= tensors_of(modules, f"{component}.", "diffusers")
            settings |= {f"{component}.{key}": value for key, value in settings_of(modules).items()}
    metadata = kept_metadata(bundle.metadata)
    metadata[HEADER_KEY] = json.dumps(settings, sort_keys=True)
    return Layout(tensors, metadata)


def program_file(bundle: LoraBundle, format: str) -> Layout:
    """Lay an adapter out in a dialect with the names of the family's own checkpoints.

    Raises:
        FormatError: Only some parts of a fused layer are DoRA adapters, or the format has no names
            for a family or a text encoder.
    """
    style = program_style(format, bundle.family)
    assert style is not None
    if format == "bfl" and bundle.family != "flux":
        refuse("bfl", sorted(bundle.modules), "it has names for the layers of FLUX.1 alone")
    layout = laid_out(bundle, style)
    module = {"ss_network_module": f"networks.lora_{bundle.family}"} if format == "kohya" else {}
    return layout._replace(metadata=layout.metadata | module)


FORMATS: dict[str, Callable[[LoraBundle], Layout]] = {
    "diffusers": diffusers_file,
    "peft": peft_folder,
    "kohya": lambda bundle: program_file(bundle, "kohya"),
    "bfl": lambda bundle: program_file(bundle, "bfl"),
    "comfyui": lambda bundle: program_file(bundle, "comfyui"),
}  # name of a format to the function that lays an adapter out in it


def text_encoders(format: str | Style, family: str) -> frozenset[str]:
    """Return the text encoders whose adapters a format can hold next to those of a transformer."""
    if format == "diffusers":
        return frozenset(LOADED.get(family, ENCODERS))
    style = format if isinstance(format, Style) else program_style(format, family)
    return frozenset(style.networks if style else ()) - {TRANSFORMER}


_DOWN = (".lora_A.weight", "down.weight")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_lora(
    bundle: LoraBundle,
    path: str | Path,
    format: str | Style = "diffusers",
    dtype: str | None = None,
) -> Path:
    """Write an adapter.

    Args:
        bundle: The adapter.
        path: A ``.safetensors`` file; for ``peft`` a folder.
        format: ``diffusers``, ``peft``, ``kohya``, ``bfl`` or ``comfyui``, or the dialect of a file
            as `diffusion.lora_file.dialects.style_of` returns it.
        dtype: ``float32``, ``float16`` or ``bfloat16``, in which factors are rounded; by default
            that of the file that was read, and float32 where a value would change.

    Raises:
        FormatError: There is nothing to write, a value is not finite or too large, or the format
            has no way to store some layers; they are named.
        GatesError: The place cannot be written.
    """
    if not isinstance(format, Style):
        check_option("format", format, FORMATS, FormatError)
    if dtype is not None:
        check_option("dtype", dtype, DTYPES, FormatError)
    place = Path(path)
    if format != "peft" and place.suffix != ".safetensors":
        raise FormatError(f"{place.name} must end with .safetensors, as it is a single file")
    if not bundle.modules and not any(bundle.text_encoders.values()):
        raise FormatError("the adapter changes no layer; there is nothing to write")
    _check_ranks(bundle.ranks())
    layout = laid_out(bundle, format) if isinstance(format, Style) else FORMATS[format](bundle)
    _check_ranks({n: t.shape[0] for n, t in layout.tensors.items() if n.endswith(_DOWN)})
    raw = _bytes(layout, bundle.storage if dtype is None else DTYPES[dtype], exact=dtype is None)
    if layout.config is None:
        return write_bytes(place, raw)
    with replacing(place) as folder:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(raw)
        text = json.dumps(layout.config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    return place


def _check_ranks(ranks: Mapping[str, int]) -> None:
    """Refuse ranks that no reader would take, before they are expanded.

    Raises:
        FormatError: They are named.
    """
    if high := sorted(name for name, rank in ranks.items() if rank > LIMITS.rank):
        raise FormatError(
            f"rank {ranks[high[0]]} of {listed(high)} is above {LIMITS.rank}; shrink the adapter "
            "to a rank first"
        )


def _bytes(layout: Layout, dtype: torch.dtype, *, exact: bool) -> bytes:
    """Return the bytes of the file of weights.

    Raises:
        FormatError: A value is not finite or too large for the dtype.
    """
    stored = {
        name: tensor if name in layout.exact else in_storage(tensor, dtype, exact)
        for name, tensor in layout.tensors.items()
    }
    for name, tensor in stored.items():
        if not torch.isfinite(layout.tensors[name]).all():
            raise FormatError(f"{name} holds NaN or infinity, which no program can use")
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{name} holds values that are too large for {dtype}; use float32")
    return serialize(stored, layout.metadata)
