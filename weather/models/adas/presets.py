"""Configurations of Adas, published and small, the forms that are compared, official weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weather.models.adas.network import Adas

MOST_COLUMNS = 64  # of tokens: what trains on a processor; more take a finer patch by hand
PATCHES = (*range(2, 25), 1)
WINDOWS = (5, 4, 6, 3, 7, 8, 2)


def network_shape(
    grid_shape: tuple[int, int], num_surface: int, num_upper: int, num_levels: int
) -> dict[str, Any]:
    """Return arguments of `.network.Adas` for a grid and channels.

    Patches are the smallest that cover the grid and leave at most 64 columns of tokens, in rows
    that windows divide at all three scales, twice at least: then nothing is padded around the globe
    and the network is equivariant in longitude. Where no patch does so, windows are padded.

    Args:
        grid_shape: Latitude rows and longitude columns.
        num_surface: Channels without a level.
        num_upper: Variables on levels.
        num_levels: Levels of each of them.
    """
    patch, window = _patch_and_window(grid_shape)
    rows = -(-(grid_shape[0] // patch) // 4)  # of tokens at the coarsest scale
    first = 3 if num_levels + bool(num_surface) > 2 else 1
    return {
        "grid_shape": list(grid_shape),
        "num_surface": num_surface,
        "num_upper": num_upper,
        "num_levels": num_levels,
        "patch_size": [patch, patch],
        "window_size": [2 if num_levels + bool(num_surface) > 1 else 1, min(window, rows), window],
        "kernel_sizes": [[first, 3, 5], [first, 3, 3], [first, 3, 3]],
    }


def _patch_and_window(grid_shape: tuple[int, int]) -> tuple[int, int]:
    rows, columns = grid_shape
    covering = [p for p in PATCHES if (rows - rows % 2) % p == 0 and columns % p == 0]
    few = [p for p in covering if columns // p <= MOST_COLUMNS and rows // p >= 4] or covering
    for patch in few:
        coarse, rest = divmod(columns // patch, 4)
        for window in WINDOWS:
            if not rest and coarse % window == 0 and coarse // window >= 2:
                return patch, window
    return few[0], 4


_KERNELS = ((3, 5, 7), (3, 3, 5), (3, 3, 3))

_FENGWU = {"num_surface": 4, "num_upper": 5, "num_levels": 13}

_PUBLISHED = {
    "kernel_sizes": _KERNELS,
    "decoder_depth": 8,
    "position": "full",
    "circular_longitude": False,
    "legacy_clip": True,
}

_OURS = {"kernel_sizes": _KERNELS, "position": "latitude", "circular_longitude": True}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "official": _PUBLISHED
    | _FENGWU
    | {
        "grid_shape": (721, 1440),
        "dim": 192,
        "patch_size": (6, 6),
        "window_size": (2, 5, 10),
        "num_heads": 8,
        "recompute": True,
    },
    "fnp": _PUBLISHED
    | _FENGWU
    | {
        "grid_shape": (128, 256),
        "dim": 96,
        "patch_size": (2, 2),
        "window_size": (2, 4, 8),
        "num_heads": 4,
    },
    "small": _OURS
    | _FENGWU
    | {
        "grid_shape": (32, 64),
        "dim": 24,
        "patch_size": (2, 2),
        "window_size": (2, 4, 4),
        "num_heads": 4,
        "decoder_depth": 4,
    },
    "tiny": _OURS
    | {
        "grid_shape": (32, 64),
        "num_surface": 4,
        "num_upper": 5,
        "num_levels": 8,
        "dim": 16,
        "patch_size": (2, 2),
        "window_size": (2, 4, 4),
        "num_heads": 2,
        "decoder_depth": 2,
    },
    "unit": _OURS
    | {
        "grid_shape": (16, 32),
        "num_surface": 4,
        "num_upper": 5,
        "num_levels": 2,
        "dim": 4,
        "patch_size": (2, 2),
        "window_size": (2, 2, 2),
        "num_heads": 2,
        "decoder_depth": 2,
    },
    "swe": _OURS
    | {
        "grid_shape": (32, 64),
        "num_surface": 3,
        "num_upper": 0,
        "num_levels": 0,
        "dim": 12,
        "patch_size": (2, 2),
        "window_size": (1, 4, 4),
        "num_heads": 2,
        "kernel_sizes": ((1, 5, 7), (1, 3, 5), (1, 3, 3)),
        "decoder_depth": 2,
    },
    "era5": _OURS
    | {
        "grid_shape": (61, 120),
        "num_surface": 0,
        "num_upper": 2,
        "num_levels": 2,
        "dim": 16,
        "patch_size": (2, 2),
        "window_size": (2, 5, 5),
        "num_heads": 2,
        "decoder_depth": 2,
    },
}
"""Arguments of `Adas` by name: `official` (FengWu-Adas, 0.25 degrees) and `fnp` (OpenEarthLab/FNP,
1.40625 degrees) take the published weights; the others are equivariant in longitude, with at least
two windows on the coarsest circle: `small` (69 channels), `tiny` (8-level model), `unit` (tests),
`swe` (shallow water), `era5` (the shipped ensemble sample)."""


def adas_preset(name: str, **overrides: Any) -> Adas:
    """Build a published or small configuration of Adas.

    Args:
        name: One of `PRESETS`.
        overrides: Arguments of `Adas` that replace the preset's.

    Returns:
        The network with fresh weights; inside ``with torch.device("meta")`` without storage.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return Adas(**{**PRESETS[name], **overrides})


FORMS: Mapping[str, Mapping[str, Any]] = {
    "adas_increment": {"output": "increment", "gated": True, "open_gate": False},
    "adas_official": {"output": "analysis", "gated": True, "open_gate": False},
    "ungated": {"output": "increment", "gated": False, "open_gate": False},
}
"""Arguments of `.network.Adas` of each form; all have the same parameters.

``adas_increment`` sees innovations and returns an increment, ``adas_official`` sees observations
and returns the whole field, as the published network does. ``ungated`` is the control of the
increment form: the gate stream is added before the activation instead of multiplied after it.
"""


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
