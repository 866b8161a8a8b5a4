"""The sizes of FengWu."""

from collections.abc import Mapping
from typing import Any

from core_gates.errors import check_option
from weather.models.fengwu.network import FengWu

_FENGWU = {"num_surface": 4, "num_upper": 5, "num_levels": 13}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "official": _FENGWU
    | {
        "grid_shape": (721, 1440),
        "dim": 192,
        "patch_size": (4, 4),
        "window_size": (6, 12),
        "num_heads": (6, 12),
        "depths": (2, 6),
        "fuser_depth": 6,
        "drop_path": 0.2,
        "position": "full",
        "gated_skip": False,
        "recompute": True,
    },
    "small": _FENGWU
    | {
        "grid_shape": (32, 64),
        "dim": 48,
        "window_size": (4, 8),
        "num_heads": (3, 6),
        "depths": (2, 2),
        "fuser_depth": 4,
        "drop_path": 0.1,
    },
    "tiny": {
        "grid_shape": (32, 64),
        "num_surface": 1,
        "num_upper": 3,
        "num_levels": 8,
        "dim": 32,
        "window_size": (4, 8),
        "num_heads": (2, 4),
        "depths": (1, 2),
        "fuser_depth": 2,
    },
    "unit": {
        "grid_shape": (16, 32),
        "num_surface": 3,
        "num_upper": 0,
        "num_levels": 0,
        "dim": 8,
        "window_size": (2, 4),
        "num_heads": (2, 2),
        "depths": (1, 2),
        "fuser_depth": 2,
    },
}
"""Arguments of `FengWu` by name: `official`, the 69 channels at 0.25 degrees in the shape of public
descriptions of the paper; `small`, the same channels on 32 x 64; `tiny`, the state of the dry
8-level model; `unit`, for tests. All but `official` are equivariant in longitude."""


def fengwu_preset(name: str, **overrides: Any) -> FengWu:
    """Build a size of FengWu.

    Args:
        name: One of `PRESETS`.
        overrides: Arguments of `FengWu` that replace the preset's.

    Returns:
        The network with fresh weights; inside ``with torch.device("meta")`` without storage.

    Raises:
        ValueError: There is no such preset.
    """
    check_option("preset", name, PRESETS)
    return FengWu(**{**PRESETS[name], **overrides})
