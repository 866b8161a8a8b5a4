"""Checks that no feature knows what it should predict, or what comes later."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from core_gates.errors import GatesError
from recsys.schema import FeatureSchema
from video_multitask.feed import POST_EXPOSURE, add_labels
from video_multitask.history import UserHistory, add_history
from video_multitask.kuairand.releases import STATISTICS

PAST = ("video_id",)  # columns whose past values a row gets
CHECKED = 5_000  # first rows, whose features are computed again with another future


def check_features(schema: FeatureSchema) -> None:
    """Refuse features that exist only after the video was shown.

    Args:
        schema: Its features are checked; that labels are none is checked when made.

    Raises:
        GatesError: A feature is a label, a play or stay time, or a statistic.
    """
    if late := sorted(POST_EXPOSURE & set(schema.features)):
        raise GatesError(
            f"the features {', '.join(late)} are known only after the video was shown; use their "
            "past values instead, such as past_mean_is_click"
        )
    if leaking := sorted(name for name in schema.features if name.startswith(STATISTICS)):
        raise GatesError(
            f"the features {', '.join(leaking[:3])} are averages over the test period, too: "
            "leave them out"
        )


def check_causal(
    make: Callable[[pl.DataFrame], pl.DataFrame],
    log: pl.DataFrame,
    names: Sequence[str],
    *,
    cuts: int = 3,
    time: str = "time_ms",
    seed: int = 0,
) -> None:
    """Refuse features that change when the present and the future change.

    At several times t, all columns but user and time of the rows at t or later are permuted; the
    features of rows up to t must stay the same.

    Args:
        make: Adds the features to a log, rows in the same order.
        log: With outcomes.
        names: Features that are checked, none of which the log may have.
        cuts: Number of times.
        time: Column of the time.
        seed: Of the permutations.

    Raises:
        GatesError: A feature knows rows at its time or later.
    """
    rng = np.random.default_rng(seed)
    before = make(log)
    times = log[time].unique().sort()
    kept = [name for name in log.columns if name in (time, "user_id")]
    for k in range(1, cuts + 1):
        cut = times[min(len(times) - 1, len(times) * k // (cuts + 1))]
        late = (log[time] >= cut).to_numpy()
        order = np.arange(len(log))
        order[late] = rng.permutation(order[late])
        shuffled = log[order].with_columns(log[name] for name in kept).select(log.columns)
        after = make(shuffled)
        early = log[time] <= cut
        for name in names:
            a, b = before[name].filter(early), after[name].filter(early)
            if not a.equals(b, null_equal=True):
                raise GatesError(
                    f"the feature {name} of rows up to {time} = {cut} depends on rows at that time "
                    "or later; use strictly earlier rows only"
                )


def checked_history(log: pl.DataFrame, length: int, means: Sequence[str]) -> UserHistory:
    """Return what adds the past of its user to a row, after a check on the first rows of a log.

    Args:
        log: KuaiRand's, as its files have it.
        length: Newest videos of the past.
        means: Outcomes whose mean over the past is added.

    Raises:
        GatesError: A feature knows the present or the future.
    """
    past = UserHistory(length, PAST, means)
    log = add_labels(log.head(CHECKED)).sort("time_ms", maintain_order=True)
    if len(log):
        check_causal(lambda rows: add_history(rows, length, PAST, means), log, past.names)
    return past
