"""Give every method the same number of trials, and keep the best setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

Box = Mapping[str, tuple[float, float]]
Setting = dict[str, float]

OPTIMIZER_BOX: Box = {"learning_rate": (5e-4, 1e-2), "weight_decay": (1e-3, 1e-1)}
"""Box of the optimizer of every network."""


def search(
    box: Box,
    score: Callable[[Setting], float],
    *,
    trials: int = 8,
    seed: int = 0,
    report: Callable[[int, Setting, float], None] = lambda *_: None,
) -> tuple[Setting, float]:
    """Minimize a score over a box of positive settings, all on logarithmic axes.

    The first five eighths of the trials are a scrambled Sobol set of the box; the others a Sobol
    set of a box a quarter as wide (in logarithms) around the best setting so far.

    Args:
        box: Lower and upper bound of every setting, positive.
        score: The smaller the better; NaN counts as infinite.
        trials: Evaluations in all.
        seed: Of the Sobol sets.
        report: Called after every trial with its number, setting and score.

    Returns:
        The best setting and its score.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    for name, (low, high) in box.items():
        if not 0 < low <= high:
            raise ValueError(f"{name}: need 0 < low <= high, got {low}, {high}")
    wide = max(1, math.ceil(trials * 5 / 8))
    best: Setting = {}
    best_score = math.inf
    points = torch.quasirandom.SobolEngine(len(box), scramble=True, seed=seed).draw(wide)  # type: ignore[no-untyped-call]
    fine = torch.quasirandom.SobolEngine(len(box), scramble=True, seed=seed + 1).draw(trials)  # type: ignore[no-untyped-call]
    for trial in range(trials):
        if trial < wide or not best:
            setting = _place(points[trial % wide].tolist(), box)
        else:
            setting = _place(fine[trial - wide].tolist(), _shrink(box, best))
        value = score(setting)
        value = math.inf if math.isnan(value) else value
        report(trial, setting, value)
        if value < best_score or not best:
            best, best_score = setting, value
    return best, best_score


def _place(point: list[float], box: Box) -> Setting:
    return {
        name: low * (high / low) ** position
        for position, (name, (low, high)) in zip(point, box.items(), strict=True)
    }


def _shrink(box: Box, center: Setting) -> Box:
    """Return the box a quarter as wide around ``center``, moved inside the old one."""
    small = {}
    for name, (low, high) in box.items():
        half = (high / low) ** 0.125
        middle = min(max(center[name], low * half), high / half)
        small[name] = (middle / half, middle * half)
    return small
