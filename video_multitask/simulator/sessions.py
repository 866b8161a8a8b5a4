"""Who watches when: the rows of a day in time order, before any video is chosen."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from video_multitask.simulator.settings import DAY_MS, GAP_S, LONGEST_SESSION, MEAN_SESSION

Ints = NDArray[np.int64]

TABS = (0.05, 0.78, 0.06, 0.02, 0.05, 0.01, 0.01, 0.005, 0.002, 0.002, 0.002, 0.003, 0.002, 0.002,
        0.002)  # fmt: skip


class Visits(NamedTuple):
    """Rows of a day, in time order.

    Attributes:
        user: Number of the user (n,).
        position: Videos seen before in the session (n,).
        ms: Milliseconds since midnight (n,).
        tab: Page of the app, 0 to 14, one per session (n,).
    """

    user: Ints
    position: Ints
    ms: Ints
    tab: Ints

    def take(self, rows: slice) -> "Visits":
        """Return some of the rows."""
        return Visits(*(column[rows] for column in self))


def hour_effect(hour: NDArray[np.integer], size: float) -> NDArray[np.float64]:
    """Return the effect of the local hour on interest: 0 at 21 o'clock, else negative."""
    return size * (np.cos((np.asarray(hour) - 21.0) * (2.0 * np.pi / 24.0)) - 1.0)


def draw_visits(rows: int, activity: NDArray[np.float64], rng: np.random.Generator) -> Visits:
    """Draw sessions of geometric length, of active users more often, until a day is full.

    Args:
        rows: Rows of the day; the last session is cut.
        activity: Relative activity of the users (U,).
        rng: Random generator of the day.
    """
    length = _lengths(rows, rng)
    sessions = len(length)
    edges = np.cumsum(activity)
    user = np.searchsorted(edges, rng.random(sessions) * edges[-1], side="right")
    visits = np.exp(hour_effect(np.arange(24), 1.0))
    hour = np.searchsorted(np.cumsum(visits / visits.sum()), rng.random(sessions))
    start = (np.minimum(hour, 23) + rng.random(sessions)) * 3.6e6
    tab = np.searchsorted(np.cumsum(TABS), rng.random(sessions) * sum(TABS), side="right")

    first = np.concatenate([[0], np.cumsum(length)[:-1]])
    session = np.repeat(np.arange(sessions), length)
    position = np.arange(rows) - first[session]
    gap = np.round(1000.0 * GAP_S * (0.5 + rng.standard_exponential(rows) / 2.0))
    gap[first] = 0.0
    since = np.cumsum(gap)
    since -= since[first][session]
    spent = since[first + length - 1]
    ms = np.floor(np.minimum(start, DAY_MS - 1.0 - spent))[session] + since
    order = np.argsort(ms, kind="stable")
    chosen = session[order]
    return Visits(user[chosen], position[order], ms[order].astype(np.int64), tab[chosen])


def _lengths(rows: int, rng: np.random.Generator) -> Ints:
    lengths, total = [], 0
    while total < rows:
        drawn = rng.geometric(1.0 / MEAN_SESSION, 64 + rows // MEAN_SESSION)
        lengths.append(np.minimum(drawn, LONGEST_SESSION))
        total += int(lengths[-1].sum())
    length = np.concatenate(lengths)
    ends = np.cumsum(length)
    last = int(np.searchsorted(ends, rows))
    length = length[: last + 1]
    length[last] -= ends[last] - rows
    return length
