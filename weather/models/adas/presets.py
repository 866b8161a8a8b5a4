"""The published and the small configurations of Adas."""

from collections.abc import Mapping
from typing import Any

from weather.models.adas.network import Adas

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
