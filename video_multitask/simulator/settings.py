"""The numbers of the simulated feed."""

from dataclasses import dataclass

from core_gates.errors import check_at_least
from video_multitask.tasks import LABELS

FACTORS, TOPICS, STYLES = 8, 24, 12
CANDIDATES = 50
RANDOM_FRACTION = 0.0037
"""Fraction of rows whose video was drawn uniformly, as in KuaiRand-1K."""

TASKS = tuple(LABELS)
WATCH_TASKS, INTERACTIONS = TASKS[:5], TASKS[5:]
BASE_RATES = {
    "like": 0.03,
    "comment_stay": 0.05,
    "profile_enter": 0.012,
    "collect": 0.006,
    "comment": 0.004,
    "follow": 0.002,
    "forward": 0.0015,
    "download": 0.001,
    "hate": 0.0008,
}
"""Mean true probability of each interaction under the logging policy."""

SLOPES = (0.5, 0.4, 0.3, 0.5, 0.3, 0.4, 0.4, 0.4, -0.6)
"""Change of the logit of each interaction per unit of interest."""

INTEREST_NOISE = 0.85
"""Standard deviation of what no feature explains of the interest w."""

AFFINITY, DURATION, POSITION, HOUR = 0.9, -0.25, -0.03, 0.12
PLAY_SLOPE, PLAY_OFFSET = 0.9, -0.7

POLICY_SHARPNESS, POLICY_NOISE = 0.6, 0.5
"""Of the softmax over candidates, and of the affinity that it is given."""

MEAN_SESSION, LONGEST_SESSION = 9, 60
GAP_S = 20.0
DRIFT = 0.06
"""Daily step of each coordinate of a topic."""

START_MS = 1_649_347_200_000
"""Midnight of the first day in China (UTC+8)."""

DAY_MS = 86_400_000
MOST_DAYS = 31
"""Days that logs in KuaiRand's format can have: 8 April to 8 May 2022."""

BLOCK = 2**14
"""Rows that share a random generator."""


@dataclass(frozen=True)
class WorldSettings:
    """Sizes and kind of a simulated feed.

    Attributes:
        users: Number of users.
        videos: Number of videos; three in ten are uploaded during the days of the log.
        days: Days of the log, from 8 April 2022.
        seed: Of users, videos and tastes.
        groups: Let interactions depend on other factors, fields and effects than watching does: a
            network profits from giving its groups different features.
        heavy_counts: Add four raw heavy-tailed counts to each row.

    Raises:
        ValueError: A number is too small, or there are more than 31 days.
    """

    users: int = 2_000
    videos: int = 4_000
    days: int = 14
    seed: int = 0
    groups: bool = False
    heavy_counts: bool = False

    def __post_init__(self) -> None:
        """Refuse worlds that are too small, or last too long."""
        check_at_least(2, users=self.users)
        check_at_least(CANDIDATES, videos=self.videos)
        check_at_least(1, days=self.days)
        check_at_least(0, seed=self.seed)
        if self.days > MOST_DAYS:
            raise ValueError(
                f"days is {self.days}; choose {MOST_DAYS} at most, those of KuaiRand's month"
            )
