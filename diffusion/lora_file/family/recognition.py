"""Which family of models a file was trained for, by the names of its tensors, then by metadata."""

import re
from collections.abc import Iterable, Mapping

from diffusion.lora_file.family.layers import index_of

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
)
"""Patterns of names that neither FLUX.1 nor SD3 has."""

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
    if other := _other(shapes):
        return other, "names of tensors"
    fitting, told = list(candidates), _told(metadata)
    if len(fitting) == 1:
        return fitting[0], "names of tensors"
    if told and (not fitting or told in fitting or told not in ("flux", "sd3")):
        return told, "metadata"
    if not fitting:
        return "unknown", "no name and no metadata is known"
    return _by_size(shapes)


def _other(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for name, pattern in OTHERS:
        found = re.compile(pattern)
        hits = [key for key in shapes if found.search(key) and not _of_text(key)]
        if hits:
            return _unet(shapes) if name == "unet" else name
    return None


def _of_text(key: str) -> bool:
    return key.startswith(("lora_te", "text_encoder"))


def _unet(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return which model with a U-Net it is, by the width of the text it attends to."""
    if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in shapes):
        return "sdxl"
    for key, shape in shapes.items():
        if re.search(r"attn2[._]to_[kv]\b.*(?:down|lora_A)", key) and len(shape) > 1:
            return _UNETS.get(shape[1], "unet")
    return "unet"


def _told(metadata: Mapping[str, str]) -> str | None:
    for key in METADATA_KEYS:
        text = metadata.get(key, "").lower()
        for name, pattern in _METADATA:
            if re.search(pattern, text):
                return name
    return None


def _by_size(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Decide between families with the same names by the number of blocks."""
    blocks = [index for key in shapes if (index := index_of(key)) is not None]
    wide = any(_QWEN_WIDTH in shape for shape in shapes.values())
    if max(blocks, default=0) >= 38 or (max(blocks, default=0) >= 19 and wide):
        return "qwen-image", "number and width of blocks"
    if max(blocks, default=0) >= 19:
        return "sd3", "number of blocks"
    widths = {size for shape in shapes.values() for size in shape}
    if widths & {1536, 2432} and not wide:
        return "sd3", "width of blocks"
    return "flux", "the names fit flux and sd3, flux is assumed"
