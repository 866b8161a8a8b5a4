"""Write an adapter in a format of choice: atomically, and with the same bytes every time."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.errors import check_option
from diffusion.lora_file.bundle import LoraBundle, fuse
from diffusion.lora_file.container import LIMITS, FormatError, LoraFileError, listed, serialize
from diffusion.lora_file.factors import Factors, Sizes
from diffusion.lora_file.family import FAMILIES, index_of
from diffusion.lora_file.names import BFL_FLUX, NATIVE_SD3, NameTable
from diffusion.lora_file.scales import CONFIG, HEADER_KEY, WEIGHTS
from harness.files.atomic import replacing, write_bytes

STALE = {
    "lora_adapter_metadata",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_module",
    "ss_network_args",
    "format",
}  # metadata that describes the former file


class Layout(NamedTuple):
    """An adapter in a format.

    Attributes:
        tensors: By name, not yet in the dtype of the file.
        metadata: Text of the header.
        config: Content of ``adapter_config.json``; None for formats of a single file.
        exact: Names of tensors that keep their dtype, such as α.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None = None
    exact: frozenset[str] = frozenset()


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that is true of the new file, too."""
    return {key: text for key, text in metadata.items() if key not in STALE} | {"format": "pt"}


def refuse(format_name: str, names: list[str], why: str) -> None:
    """Refuse an adapter if there are layers that a format cannot store.

    Raises:
        FormatError: ``names`` is not empty.
    """
    if names:
        raise FormatError(
            f"the format {format_name} cannot store {listed(sorted(names), 8)}: {why}; "
            "choose another format"
        )


def most_common(values: Iterable[float]) -> float:
    """Return the most frequent value, the smallest of several."""
    count = Counter(values)
    return min(count, key=lambda value: (-count[value], value))


def in_storage(tensor: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """Return a tensor in the dtype of a file.

    Args:
        tensor: As computed.
        dtype: Wanted; float8 is written as bfloat16, which holds the same values.
        exact: Keep float32 where a value would change.
    """
    if dtype.itemsize == 1:
        dtype = torch.bfloat16
    stored = tensor.to(dtype)
    if exact and not torch.equal(stored.to(tensor.dtype), tensor):
        return tensor if tensor.dtype == torch.float64 else tensor.float()
    return stored


def alpha_of(factors: Factors) -> float:
    """Return the α that gives the scale of a layer, α/r."""
    return factors.scale * factors.rank


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
        tensors[f"{prefix}{name}.lora_A.weight"] = factors.down
        tensors[f"{prefix}{name}.lora_B.weight"] = factors.up
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
        if component not in LOADED[bundle.family]
        for name in modules
    ]
    refuse("diffusers", ignored, f"diffusers reads no adapters of it for {bundle.family}")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, modules in {"transformer": bundle.modules, **bundle.text_encoders}.items():
        if modules:
            tensors |= tensors_of(modules, f"{component}.", "diffusers")
            settings |= {f"{component}.{key}": value for key, value in settings_of(modules).items()}
    metadata = kept_metadata(bundle.metadata)
    metadata[HEADER_KEY] = json.dumps(settings, sort_keys=True)
    return Layout(tensors, metadata)


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


FORMATS: dict[str, Callable[[LoraBundle], Layout]] = {
    "diffusers": diffusers_file,
    "peft": peft_folder,
    "kohya": kohya,
    "bfl": bfl,
    "comfyui": comfyui,
}  # name of a format to the function that lays an adapter out in it


def text_encoders(format: str, family: str) -> frozenset[str]:
    """Return the text encoders whose adapters a format can hold next to those of a transformer."""
    return frozenset(LOADED[family] if format == "diffusers" else encoders_of(format, family))


_DOWN = (".lora_A.weight", ".lora_down.weight")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_lora(
    bundle: LoraBundle, path: str | Path, format: str = "diffusers", dtype: str | None = None
) -> Path:
    """Write an adapter.

    Args:
        bundle: The adapter.
        path: A ``.safetensors`` file; for ``peft`` a folder.
        format: ``diffusers``, ``peft``, ``kohya``, ``bfl`` or ``comfyui``.
        dtype: ``float32``, ``float16`` or ``bfloat16``, in which factors are rounded; by default
            that of the file that was read, and float32 where a value would change.

    Raises:
        FormatError: There is nothing to write, a value is not finite or too large, or the format
            has no way to store some layers; they are named.
        GatesError: The place cannot be written.
    """
    check_option("format", format, FORMATS, FormatError)
    if dtype is not None:
        check_option("dtype", dtype, DTYPES, FormatError)
    place = Path(path)
    if format != "peft" and place.suffix != ".safetensors":
        raise FormatError(f"{place.name} must end with .safetensors, as {format} is a single file")
    if not bundle.modules and not any(bundle.text_encoders.values()):
        raise FormatError("the adapter changes no layer; there is nothing to write")
    _check_ranks(bundle.ranks())
    layout = FORMATS[format](bundle)
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
