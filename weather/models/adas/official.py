"""Load weights of the official FengWu-Adas code into `weather.models.adas.network.Adas`."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_STREAMS = ("background", "observation", "confidence")

_RENAMES = (  # applied in this order to dotted names
    (r"^absolute_pos_embed$", "position"),
    (r"^patchunembed\.", "recovery."),
    (r"\bproj3d\b", "upper"),
    (r"\bproj2d\b", "surface"),
    (r"\bcrosslayer\.", "cross."),
    (r"\bback([12])\b", r"background\1"),
    (r"\bobser([12])\b", r"observation\1"),
    (r"\bnorm_condition\b", "norm_key"),
    (r"\brelative_position_bias_table\b", "position_bias"),
    (r"\bmlp\.fc1\b", "mlp.0"),
    (r"\bmlp\.fc2\b", "mlp.2"),
    (r"\b(reduction|expansion)\b", "linear"),
    (r"^decoder\.blocks\.", "decoder."),
    (r"^layer\d\.conv\b", r"\g<0>.conv_x"),
    (r"^(layer\d)\.gateconv\b", r"\1.conv.conv_o"),
    (r"^(layer\d)\.gate\b", r"\1.conv.conv_g"),
)

_INDEXED = (
    (r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"^patchembed\.patch(\d)\.", lambda m: f"embeddings.{_STREAMS[int(m[1]) - 1]}."),
    (r"\bsamplelayer\.(?:merge|expand)(\d)\.", lambda m: f"resample.{_STREAMS[int(m[1]) - 1]}."),
)


def convert_official_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the parameters of an official checkpoint for `Adas.load_state_dict`.

    The mapping, official to ours:

    - ``layerN.{conv, gateconv, gate}`` to ``stages.(N-1).conv.{conv_x, conv_o, conv_g}``;
    - ``layerN.crosslayer.{back1, obser1, back2, obser2}`` to ``stages.(N-1).cross.{background1,
      observation1, background2, observation2}``, inside them ``norm_condition`` to ``norm_key``,
      ``mlp.fc1|fc2`` to ``mlp.0|2``, and ``attn.q|k|v``, stacked, to ``attn.qkv``;
    - ``layerN.crosslayer.gate``, a 1 x 1 x 1 convolution, to ``stages.(N-1).cross.gate``, linear;
    - ``layerN.samplelayer.{merge, expand}K.{reduction, expansion}`` to
      ``stages.(N-1).resample.STREAM.linear``, K = 1, 2, 3 being background, observation,
      confidence;
    - ``patchembed.patchK.{proj3d, proj2d, norm}`` to ``embeddings.STREAM.{upper, surface, norm}``
      and ``patchunembed`` to ``recovery``; their kernels lose the depth of one level;
    - ``decoder.blocks.N`` to ``decoder.N``, ``absolute_pos_embed`` to ``position``; ``fusion``
      keeps its name.

    Prefixes ``module.`` of data-parallel training and index buffers are dropped. An `Adas` for
    these weights is made with ``legacy_clip=True``, as the ``official`` preset is.

    Args:
        state: State dict of the official ``Adas_model``.

    Returns:
        State dict for `Adas`, with the tensors of ``state`` or copies.
    """
    named = {name.removeprefix("module."): value for name, value in state.items()}
    converted = {}
    for name, value in named.items():
        if name.endswith("relative_position_index") or re.search(r"\battn\.[kv]\.", name):
            continue
        if ".attn.q." in name:
            parts = (named[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv")
            name, value = name.replace(".attn.q.", ".attn.qkv."), torch.cat(tuple(parts))
        converted[_renamed(name)] = _reshaped(name, value)
    return converted


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    for pattern, function in _INDEXED:
        name = re.sub(pattern, function, name)
    return name


def _reshaped(name: str, value: Tensor) -> Tensor:
    if name.endswith("crosslayer.gate.weight"):
        return value.flatten(1)
    if name.endswith("proj3d.weight"):
        return value.squeeze(2)
    return value
