"""Settings by equally many trials for every method.

A box is searched twice: as a whole, then around the best, also beyond an edge that it lies at, but
never beyond a limit. Of a list of values the second search keeps the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from core_gates.errors import GatesError
from harness.files.piece import Setting

Axis = tuple[float, float] | tuple[float, float, float] | list[float]
Box = Mapping[str, Axis]
Space = Box | Sequence[Setting]
"""A box, or a list of settings.

An axis of a box has two edges, and perhaps the largest value that has a meaning; places on it are
logarithmic. A list is a choice of values.
"""

Figures = Mapping[str, float]
Choose = Callable[[Sequence[Figures]], int]

EXPLORED = 5 / 8  # of the trials
QUARTER = 0.25  # width of the second box, in widths of the first
NEAR_EDGE = 0.05
BEYOND = 0.5  # widths that the second box reaches beyond an edge


class Choice(NamedTuple):
    """The setting of a method.

    Attributes:
        setting: The best that was tried.
        trials: Everything that was tried, each with its figures.
        edges: Settings whose best value lies at an edge of what was searched.
    """

    setting: Setting
    trials: list[Setting]
    edges: list[str]


def lowest(figures: Sequence[Figures]) -> int:
    """Return the place of the lowest ``score``; NaN is never taken.

    Raises:
        GatesError: All are NaN.
    """
    scores = [float(figure["score"]) for figure in figures]
    finite = [place for place, score in enumerate(scores) if not math.isnan(score)]
    if not finite:
        raise GatesError(f"none of {len(scores)} trials has a score: all are NaN")
    return min(finite, key=scores.__getitem__)


def check_space(name: str, space: Space, trials: int) -> None:
    """Refuse a space that cannot be searched with that many trials.

    Raises:
        GatesError: There are no trials; a list has another length; a box has an empty side, or
            one that is not positive.
    """
    if trials < 1:
        raise GatesError(f"--trials must be at least 1, found {trials}")
    if isinstance(space, Mapping):
        for axis, side in space.items():
            if not isinstance(side, list) and not 0 < side[0] < side[1] <= side[-1] < math.inf:
                raise GatesError(
                    f"{axis} of {name} is searched from {' to '.join(map(str, side))}: expected "
                    "positive numbers, the lower one first"
                )
    elif len(space) != trials:
        raise GatesError(
            f"{name} lists {len(space)} settings, but every method gets {trials} trials: list as "
            "many, or set trials"
        )


def first_trials(
    space: Space, trials: int, seed: int, plain: Setting | None = None
) -> list[Setting]:
    """Return the settings to try first: a whole list, or Sobol points, 5/8 of the trials, of a box.

    A plain setting takes the place of the last one of a box, and is tried before the others.
    """
    if not isinstance(space, Mapping):
        return [dict(setting) for setting in space]
    first = [] if plain is None else [dict(plain)]
    count = math.ceil(EXPLORED * trials) - len(first)
    return first + [_setting(space, point) for point in _sobol(len(space), count, seed)]


def more_trials(space: Space, trials: int, seed: int, best: Setting) -> list[Setting]:
    """Return the settings that are tried next, in a quarter-wide box around the best so far.

    Where that box comes within 5 % of an edge, it reaches half a width beyond it, or to its limit.
    """
    count = trials - math.ceil(EXPLORED * trials)
    if not isinstance(space, Mapping) or count == 0:
        return []
    space = {axis: [best[axis]] if isinstance(side, list) else side for axis, side in space.items()}
    sides = [
        (0.0, 1.0) if isinstance(side, list) else _around(side, _place(side, best[axis]))
        for axis, side in space.items()
    ]
    points = _sobol(len(space), count, seed + 1)
    return [
        _setting(
            space, [low + (high - low) * x for (low, high), x in zip(sides, point, strict=True)]
        )
        for point in points
    ]


def edges_of(space: Space, tried: Sequence[Setting], best: int) -> list[str]:
    """Return the settings whose best value lies at an edge of what was searched.

    Those of a box are within 5 % of a width of the edge that was reached, and not of a limit; of a
    list, at one of its ends, if it has more than one value. A choice of values has no edges.
    """
    names = (
        list(space) if isinstance(space, Mapping) else sorted({n for trial in tried for n in trial})
    )
    edges = []
    for name in names:
        values = [trial[name] for trial in tried if isinstance(trial.get(name), int | float)]
        side = space[name] if isinstance(space, Mapping) else None
        if isinstance(side, list) or len(set(values)) < 2 or name not in tried[best]:
            continue
        if side is None:
            at_edge = tried[best][name] in (min(values), max(values))
        else:
            places = [_place(side, value) for value in values]
            low, high = min(0.0, *places), max(1.0, *places)
            place, limit = _place(side, tried[best][name]), _limit(side)
            at_edge = place < low + NEAR_EDGE or high - NEAR_EDGE < place < limit - NEAR_EDGE
        if at_edge:
            edges.append(name)
    return edges


def middle(space: Space) -> Setting:
    """Return the middle of a box, or of a list: an untuned setting."""
    if isinstance(space, Mapping):
        return _setting(space, [0.5] * len(space))
    return dict(space[len(space) // 2])


def _around(side: Axis, place: float) -> tuple[float, float]:
    low, high = max(place - QUARTER / 2, 0.0), min(place + QUARTER / 2, 1.0)
    if place - QUARTER / 2 < NEAR_EDGE:
        low = -BEYOND
    if place + QUARTER / 2 > 1 - NEAR_EDGE:
        high = min(1 + BEYOND, _limit(side))
    return low, high


def _sobol(dimensions: int, count: int, seed: int) -> list[list[float]]:
    if dimensions == 0 or count == 0:
        return [[] for _ in range(count)]
    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)
    return cast(list[list[float]], engine.draw(count, dtype=torch.float64).tolist())


def _setting(space: Box, point: Sequence[float]) -> dict[str, Any]:
    return {
        axis: side[int(x * len(side))]
        if isinstance(side, list)
        else math.exp(math.log(side[0]) + x * (math.log(side[1]) - math.log(side[0])))
        for (axis, side), x in zip(space.items(), point, strict=True)
    }


def _place(side: Axis, value: float) -> float:
    low, high = math.log(side[0]), math.log(side[1])
    return (math.log(value) - low) / (high - low)


def _limit(side: Axis) -> float:
    return _place(side, side[2]) if len(side) == 3 else math.inf
