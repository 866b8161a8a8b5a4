"""Which family a file was trained for: by the names of its tensors, by metadata, by a folder."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.lora_file.container import FamilyError, clean, parse_json
from diffusion.lora_file.factors import KINDS, Spelled, spell, unsupported
from diffusion.lora_file.family import FLUX, SD3, FluxShape, SD3Shape, index_of
from diffusion.lora_file.names import (
    OWN,
    PREFIXES,
    TABLES,
    TEXT_ENCODERS,
    TRANSFORMER,
    UNET_TABLES,
    UNETS,
    Match,
    Prefix,
)

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
        folder: As of `modules_in`.

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
        return SD3Shape(
            **numbers,
            out_channels=_number(config, "out_channels", source),
            patch_size=_number(config, "patch_size", source),
            dual_attention=tuple(int(index) for index in config.get("dual_attention_layers") or ()),
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


class Key(NamedTuple):
    """A name taken apart.

    Attributes:
        name: As in the file.
        spelled: The factor and what comes before it; None if it ends with no known factor.
        prefix: The start; None if the layer is unknown.
        layer: The name of the layer without prefix, in the dialect of the file.
        matches: Family to what the layer is in diffusers; the family of a text encoder is empty.
    """

    name: str
    spelled: Spelled | None
    prefix: Prefix | None = None
    layer: str = ""
    matches: Mapping[str, Match] = {}

    @property
    def of_transformer(self) -> bool:
        """Whether it belongs to the transformer."""
        return self.prefix is not None and self.prefix.component == TRANSFORMER

    def reason(self, family: str) -> str:
        """Return why it cannot be used in a family; empty if it can."""
        if self.spelled is None:
            what = unsupported(self.name)
            if what is None:
                return "its name ends with no known factor"
            return f"it is {what}, which is not supported"
        if self.prefix is None:
            return "no dialect has a layer of this name"
        if self.of_transformer and family not in self.matches:
            return f"{family} has no layer of this name"
        return ""


def take_apart(names: Iterable[str]) -> list[Key]:
    """Take the names of the tensors of a file apart."""
    by_stem: dict[str, tuple[Prefix | None, str, dict[str, Match]]] = {}
    keys = []
    for name in sorted(names):
        spelled = spell(name)
        if spelled is None:
            keys.append(Key(name, None))
            continue
        if spelled.stem not in by_stem:
            by_stem[spelled.stem] = _find(spelled.stem)
        keys.append(Key(name, spelled, *by_stem[spelled.stem]))
    return keys


def _find(stem: str) -> tuple[Prefix | None, str, dict[str, Match]]:
    """Return prefix, layer and matches of a name without its factor."""
    for prefix in PREFIXES:
        if not stem.startswith(prefix.text):
            continue
        layer = stem[len(prefix.text) :]
        if prefix.component != TRANSFORMER:
            if match := TEXT_ENCODERS.find(layer):
                return prefix, layer, {"": match}
            continue
        matches: dict[str, Match] = {}
        for table in TABLES:
            if table.family not in matches and (match := table.find(layer)):
                matches[table.family] = match
        if matches:
            return prefix, layer, matches
    return None, "", {}


def by_own_names(keys: Iterable[Key], family: str) -> list[Key]:
    """Return names of a model that is neither FLUX.1 nor SD3, with what its layers are called.

    Layers of U-Nets are called as in diffusers, all others as in the file, without the prefix that
    most of them have; a name with another prefix belongs to no layer. Text encoders stay.
    """
    starts = [prefix for prefix in PREFIXES if prefix.component == TRANSFORMER]
    tables = UNET_TABLES if family in UNETS else ()
    named = {key.name: key for key in keys}
    begun = {
        key.name: next(prefix for prefix in starts if key.spelled.stem.startswith(prefix.text))
        for key in named.values()
        if key.spelled is not None and (key.prefix is None or key.of_transformer)
    }
    usual = Counter(begun.values()).most_common(1)
    for name, prefix in begun.items():
        spelled = named[name].spelled
        assert spelled is not None
        layer = spelled.stem[len(prefix.text) :]
        match = next((match for table in tables if (match := table.find(layer))), None)
        if match is None and prefix == usual[0][0]:
            match = Match(OWN, (layer,), "never", "." not in layer)
        named[name] = Key(name, spelled, prefix, layer, {family: match} if match else {})
    return list(named.values())


def fitting_families(keys: Iterable[Key]) -> list[str]:
    """Return the families whose names fit the largest number of tensors of the transformer."""
    votes = Counter(family for key in keys if key.of_transformer for family in key.matches)
    return [family for family, count in votes.items() if count == max(votes.values())]


_START = r"(?:^|\.|unet_|lycoris_)"
OTHERS: tuple[tuple[str, str], ...] = (
    ("flux2", r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj|ff\.linear_in"),
    ("chroma", r"distilled_guidance_layer"),
    ("qwen-image", r"transformer_blocks[._]\d+[._](?:img_mod|txt_mod|img_mlp|txt_mlp)"),
    (
        "hunyuan-video",
        r"double_blocks\.\d+\.(?:img|txt)_attn_(?:qkv|proj)|(?:img|txt)_mod[._]linear|"
        r"(?:img|txt)_mlp[._]fc\d|individual_token_refiner",
    ),
    ("hidream", r"double_stream_blocks|single_stream_blocks"),
    ("auraflow", r"joint_transformer_blocks|single_transformer_blocks[._]\d+[._]ff[._]"),
    ("unet", r"(?:down|up)_blocks[._]\d|mid_block|(?:input|output)_blocks[._]\d|middle_block"),
    ("z-image", r"layers[._]\d+[._]attention[._]to_[qkv]"),
    ("lumina2", r"layers[._]\d+[._](?:attention[._]qkv|feed_forward[._]w\d)"),
    ("wan", _START + r"blocks[._]\d+[._](?:self_attn|cross_attn|ffn|attn1|attn2)[._]"),
    ("ltx-video", r"transformer_blocks[._]\d+[._]attn1[._]"),
)  # patterns of names that neither FLUX.1 nor SD3 has

_METADATA = (
    ("flux2", r"flux[-_. ]?2"),
    ("flux", r"flux"),
    ("sd3", r"sd[-_]?3|stable-diffusion-(?:v?3)"),
    ("sdxl", r"sdxl|stable-diffusion-xl"),
    ("sd2", r"sd[-_]?v?2|stable-diffusion-v?2"),
    ("sd1", r"sd[-_]?v?1|stable-diffusion-v?1"),
    ("qwen-image", r"qwen[-_]?image"),
    ("wan", r"\bwan|networks\.lora_wan"),
    ("hunyuan-video", r"hunyuan[-_]?video"),
    ("chroma", r"chroma"),
    ("lumina2", r"lumina"),
)
RECOGNIZED = tuple(dict.fromkeys(name for name, _ in (*_METADATA, *OTHERS)))
"""Families that files are recognized as."""

METADATA_KEYS = (
    "modelspec.architecture",
    "ss_base_model_version",
    "ss_network_module",
    "ss_sd_model_name",
)
_UNETS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of the text they attend to
_TEXT = re.compile(r"attn2[._](?:processor[._])?to_[kv][._].*(?:down|lora_A)")
_SECOND = re.compile(r"transformer_blocks[._][1-9]")
_PART = re.compile(r"(?:(down|up)_blocks[._](\d)|(?:input|output)_blocks[._](\d+))[._]")
_CONVOLUTION = re.compile(r"resnets|in_layers|out_layers")
_QWEN_WIDTH = 3072


def recognize(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], candidates: Iterable[str]
) -> tuple[str, str]:
    """Return the family of a file and what it was concluded from.

    Args:
        shapes: Name of each tensor as stored, to its shape.
        metadata: Text of the header.
        candidates: Families whose names fit as many of the tensors as those of any other.

    Returns:
        A name, ``unknown`` if nothing decides, and the evidence.
    """
    fitting, stated_family = list(candidates), _told(metadata)
    if other := _other(shapes):
        stated = other == "unet" and stated_family in _UNETS.values()
        return (str(stated_family), "metadata") if stated else (other, "names of tensors")
    if len(fitting) == 1:
        return fitting[0], "names of tensors"
    if stated_family and (
        not fitting or stated_family in fitting or stated_family not in ("flux", "sd3")
    ):
        return stated_family, "metadata"
    return ("unknown", "no name and no metadata is known") if not fitting else _by_size(shapes)


def _other(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for name, pattern in OTHERS:
        compiled = re.compile(pattern)
        texts = ("lora_te", "text_encoder")
        if any(compiled.search(key) and not key.startswith(texts) for key in shapes):
            return _unet(shapes) if name == "unet" else name
    return None


def _unet(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return which model with a U-Net it is, by the width of the text it attends to, or its blocks.

    SDXL has several transformers in a block, and one block less than others at either side.
    """
    if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in shapes):
        return "sdxl"
    for key, shape in shapes.items():
        if _TEXT.search(key) and len(shape) > 1:
            return _UNETS.get(shape[1], "unet")
    if any(_SECOND.search(key) for key in shapes):
        return "sdxl"
    parts = [part for key in shapes if (part := _PART.search(key))]
    depth = max((int(f[2]) if f[1] else int(f[3]) // 3 for f in parts), default=0)
    return "sdxl" if depth == 2 and any(_CONVOLUTION.search(key) for key in shapes) else "unet"


def _told(metadata: Mapping[str, str]) -> str | None:
    for key in METADATA_KEYS:
        text = metadata.get(key, "").lower()
        for name, pattern in _METADATA:
            if re.search(pattern, text):
                return name
    return None


def _by_size(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Decide between families with the same names by the sizes of layers and the last block."""
    sizes = _sizes(shapes)
    width = SD3.width(sizes)
    last = max((index_of(key) or 0 for key in shapes), default=0)
    if last >= 38 or (last >= 19 and width == _QWEN_WIDTH):
        return "qwen-image", "number and width of blocks"
    if last >= 19:
        return "sd3", "number of blocks"
    if len(SD3.misfits(sizes)) < len(FLUX.misfits(sizes)):
        return "sd3", "sizes of layers"
    if width in (1536, 2432):
        return "sd3", "width of blocks"
    return "flux", "the names fit flux and sd3, flux is assumed"


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the layers whose factors fit each other, by diffusers name."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key in take_apart(shapes):
        if key.of_transformer and key.spelled is not None:
            (name, *_) = next(iter(key.matches.values())).parts
            layers.setdefault(name, {})[key.spelled.role] = shapes[key.name]
    sizes = {}
    for name, roles in layers.items():
        for kind in KINDS:
            with suppress(KeyError, ValueError):
                sizes[name] = kind.sizes(roles)[1:]
    return sizes
