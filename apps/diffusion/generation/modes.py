"""Ways to use several adapters at once, by their names on the command line."""

from __future__ import annotations

from functools import partial
from typing import Any

from core_gates.errors import GatesError, check_option
from diffusion.rivals import RIVALS, make_rival

GATED, SUM = "gated", "sum"
RIVAL_MODES = tuple(
    name
    for name, rival in RIVALS.items()
    if not (rival.trainable or rival.sees_pair or name in (SUM, "baked"))
)
"""Rivals that need neither training nor images of the pair."""

MODES = (GATED, SUM, *RIVAL_MODES)


def maker(mode: str) -> Any:
    """Return what :class:`diffusion.fusion.pipeline.AutoLoraPipeline` takes as ``mode``.

    Raises:
        GatesError: There is no such mode, or it needs more than adapters and gates.
    """
    if mode in RIVALS and mode not in MODES:
        raise GatesError(f"--mode {mode} has to be trained first: choose from {list(MODES)}")
    check_option("--mode", mode, MODES, GatesError)
    return mode if mode in (GATED, SUM) else partial(_made, mode)


def _made(name: str, model: Any, adapters: Any) -> Any:
    return make_rival(name, model, adapters)
