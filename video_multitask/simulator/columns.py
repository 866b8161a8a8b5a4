"""The log of a block of rows: columns of KuaiRand, then those that the simulator adds."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from video_multitask.labels import WATCH_RULES, follows
from video_multitask.simulator.exposure import Exposure
from video_multitask.simulator.outcomes import Outcomes
from video_multitask.simulator.sessions import Visits
from video_multitask.simulator.settings import DAY_MS, INTERACTIONS, START_MS

FIRST_DATE = np.datetime64("2022-04-08")


def log_columns(
    visits: Visits,
    shown: Exposure,
    duration_ms: NDArray[np.int64],
    outcomes: Outcomes,
    day: int,
    rng: np.random.Generator,
) -> pl.DataFrame:
    """Return rows in KuaiRand's schema, with integers as narrow as they may be.

    Added are ``is_collect``, ``is_download``, ``complete``, ``replay``, ``skip``, ``comment_stay``,
    ``position`` and ``propensity``. Stay times are lognormal, and 0 where nothing was entered.

    Args:
        visits: Users, positions and times (n).
        shown: Videos and propensities (n).
        duration_ms: Durations of the videos (n,).
        outcomes: Play times and interactions.
        day: Number of the day, 0 for 8 April 2022.
        rng: Random generator of the block, for stay times.
    """
    play = np.minimum(outcomes.play_ms, np.iinfo(np.int32).max)
    did = dict(zip(INTERACTIONS, outcomes.interactions.T.astype(np.int8), strict=True))
    stays = np.ceil(np.exp(8.5 + rng.standard_normal((len(play), 2)))).astype(np.int32)
    watched = {rule: follows(rule, play, duration_ms) for rule in WATCH_RULES}
    return pl.DataFrame(
        {
            "user_id": visits.user.astype(np.int32),
            "video_id": shown.video.astype(np.int32),
            "date": np.full(len(play), _date(day), dtype=np.int32),
            "hourmin": (visits.ms // 3_600_000 * 100).astype(np.int32),
            "time_ms": START_MS + day * DAY_MS + visits.ms,
            "is_click": watched["effective_view"],
            "is_like": did["like"],
            "is_follow": did["follow"],
            "is_comment": did["comment"],
            "is_forward": did["forward"],
            "is_hate": did["hate"],
            "long_view": watched["long_view"],
            "play_time_ms": play.astype(np.int32),
            "duration_ms": duration_ms.astype(np.int32),
            "profile_stay_time": stays[:, 0] * did["profile_enter"],
            "comment_stay_time": stays[:, 1] * did["comment_stay"],
            "is_profile_enter": did["profile_enter"],
            "is_rand": shown.random.astype(np.int8),
            "tab": visits.tab.astype(np.int8),
            "is_collect": did["collect"],
            "is_download": did["download"],
            "complete": watched["complete"],
            "replay": watched["replay"],
            "skip": watched["skip"],
            "comment_stay": did["comment_stay"],
            "position": visits.position.astype(np.int32),
            "propensity": shown.propensity,
        }
    )


def _date(day: int) -> int:
    return int(str(FIRST_DATE + day).replace("-", ""))
