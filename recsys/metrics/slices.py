"""Named parts of a test set: new users, new items, activity, exposure."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError, check_at_least

Slices = Mapping[str, np.ndarray]
"""Name of a part to its rows (N,), boolean."""


def standard_slices(
    users: ArrayLike,
    items: ArrayLike,
    *,
    train_users: ArrayLike,
    train_items: ArrayLike,
    random: ArrayLike | None = None,
    parts: int = 4,
) -> dict[str, np.ndarray]:
    """Return the parts that every ranker is judged on.

    Args:
        users: (N,) user of each test row.
        items: (N,) item of each test row.
        train_users: (M,) user of each training row.
        train_items: (M,) item of each training row.
        random: (N,) true where the item was shown at random, not chosen by a ranker.
        parts: Quantiles of activity (training rows of the user) and of exposure (training rows of
            the item); those without any are the new ones.

    Returns:
        ``new users``, ``known users``, ``new items``, ``known items``, ``activity 1/4`` (least
        active) to ``activity 4/4``, ``exposure 1/4`` to ``exposure 4/4``, and, if given,
        ``random exposure`` and ``ranked exposure``. Parts without a row are left out.

    Raises:
        GatesError: Lengths differ.
        ValueError: ``parts`` is below 1.
    """
    check_at_least(1, parts=parts)
    activity, exposure = counts_of(users, train_users), counts_of(items, train_items)
    if len(activity) != len(exposure):
        raise GatesError(f"{len(activity)} users and {len(exposure)} items, expected one per row")
    found = {
        "new users": activity == 0,
        "known users": activity > 0,
        "new items": exposure == 0,
        "known items": exposure > 0,
        **quantile_slices("activity", activity, parts=parts, among=activity > 0),
        **quantile_slices("exposure", exposure, parts=parts, among=exposure > 0),
    }
    if random is not None:
        shown = np.asarray(random, dtype=bool)
        if shown.shape != activity.shape:
            raise GatesError(f"random has shape {shown.shape}, expected {activity.shape}")
        found |= {"random exposure": shown, "ranked exposure": ~shown}
    return {name: rows for name, rows in found.items() if rows.any()}


def counts_of(values: ArrayLike, among: ArrayLike) -> np.ndarray:
    """Return how often each value (N,) occurs among others (M,)."""
    known, counts = np.unique(np.asarray(among), return_counts=True)
    wanted = np.asarray(values)
    if not len(known):
        return np.zeros(wanted.shape, dtype=np.int64)
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, counts[place], 0)


def quantile_slices(
    name: str,
    values: ArrayLike,
    *,
    parts: int = 4,
    among: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Return rows by quantile of a value, from the smallest; equal values share a part.

    Args:
        name: Of the value.
        values: (N,).
        parts: Number of parts.
        among: (N,) rows that are divided; all by default.
        names: Of the parts; ``name 1/4`` and so on by default.

    Raises:
        ValueError: There is not one name per part.
    """
    numbers = np.asarray(values, dtype=float)
    rows = np.ones(len(numbers), dtype=bool) if among is None else np.asarray(among, dtype=bool)
    if len(names) not in (0, parts):
        raise ValueError(f"{len(names)} names for {parts} parts: expected one per part")
    labels = names or [f"{name} {part + 1}/{parts}" for part in range(parts)]
    if not rows.any():
        return {}
    edges = np.quantile(numbers[rows], np.arange(1, parts) / parts)
    place = np.searchsorted(edges, numbers, side="left")
    return {label: rows & (place == part) for part, label in enumerate(labels)}
