"""The numbers of a simulated feed, and what it hides: tastes, topics, popularity, propensities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from core_gates.errors import check_at_least
from video_multitask.feed import LABELS

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

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SHORT = (0.65, 13.0, 0.5)  # fraction, median in seconds, standard deviation of the logarithm
LONG = (0.35, 65.0, 0.7)
SHORTEST_S, LONGEST_S = 3.0, 600.0
ZIPF_OFFSET = 10.0
UPLOADED_BEFORE = 0.7
DAYS_BEFORE = 30


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
        interests: Tastes of a user, of which the one with the larger affinity counts: what a user
            likes is then no bilinear form, the model of a factorization machine.

    Raises:
        ValueError: A number is too small, or there are more than 31 days.
    """

    users: int = 2_000
    videos: int = 4_000
    days: int = 14
    seed: int = 0
    groups: bool = False
    heavy_counts: bool = False
    interests: int = 1

    def __post_init__(self) -> None:
        """Refuse worlds that are too small, or last too long."""
        check_at_least(2, users=self.users)
        check_at_least(CANDIDATES, videos=self.videos)
        check_at_least(1, days=self.days, interests=self.interests)
        check_at_least(0, seed=self.seed)
        if self.days > MOST_DAYS:
            raise ValueError(
                f"days is {self.days}; choose {MOST_DAYS} at most, those of KuaiRand's month"
            )


@dataclass(frozen=True)
class Users:
    """U users: activity (U,), tastes and taste in style (U, 8), bias (U,), propensity (U, 9).

    Tables of users tell of the first taste.
    """

    activity: Floats
    tastes: tuple[Floats, ...]
    style_taste: Floats
    bias: Floats
    propensity: Floats

    def tastes_of(self, user: NDArray[np.integer]) -> list[Floats]:
        """Return the tastes of users (n,), (n, 8) each."""
        return [taste[user] for taste in self.tastes]


@dataclass(frozen=True)
class Videos:
    """V videos.

    Attributes:
        topic: Number of the topic (V,).
        style: Number of the style (V,).
        author: Number of the author (V,).
        upload_day: Day of upload, negative before the log begins (V,).
        duration_ms: Milliseconds (V,).
        popularity: Relative exposure (V,), of Zipf's law.
        own: What of the factors is not the topic's (V, 8).
        style_factors: Factors of style (V, 8), of which interactions depend in worlds with groups.
        bias: Quality, its author's included (V,).
        author_pull: Effect of the author on the logits of interactions (V, 9).
    """

    topic: Ints
    style: Ints
    author: Ints
    upload_day: Ints
    duration_ms: Ints
    popularity: Floats
    own: Floats
    style_factors: Floats
    bias: Floats
    author_pull: Floats


@dataclass(frozen=True)
class Counts:
    """Heavy-tailed lifetime counts: plays and fans of users (U, 2), shows and comments of videos.

    They are the power ⅔ of activity and popularity times lognormal numbers of spread 1.
    """

    user: Ints
    video: Ints


@dataclass(frozen=True)
class Hidden:
    """Users, videos, topics by day (days, 24, 8), and the matrices A_t of interactions (9, 8, 8).

    ``tab_pull`` (15, 9) acts in worlds with groups only, ``counts`` are logged in the stress
    setting only.
    """

    users: Users
    videos: Videos
    topics: Floats
    interaction: Floats
    tab_pull: Floats
    counts: Counts

    def factors(self, day: int) -> Floats:
        """Return the factors of all videos on a day (V, 8), of unit variance."""
        videos = self.videos
        return np.sqrt(0.5) * self.topics[day, videos.topic] + videos.own


def draw_hidden(settings: WorldSettings) -> Hidden:
    """Draw a world; a function of its settings alone."""
    rng = np.random.default_rng([settings.seed, 1])
    first = rng.standard_normal((TOPICS, FACTORS))
    steps = DRIFT * rng.standard_normal((settings.days, TOPICS, FACTORS))
    steps[0] = 0.0
    tasks = len(INTERACTIONS)
    users, videos = _users(settings, rng), _videos(settings, rng)
    return Hidden(
        users=users,
        videos=videos,
        topics=first + np.cumsum(steps, axis=0),
        interaction=0.5 * rng.standard_normal((tasks, FACTORS, FACTORS)) / np.sqrt(FACTORS),
        tab_pull=0.5 * rng.standard_normal((15, tasks)),
        counts=Counts(  # medians of about those of KuaiRand's users
            user=_heavy(users.activity, (150.0, 50.0), rng),
            video=_heavy(videos.popularity / videos.popularity.mean(), (400.0, 40.0), rng),
        ),
    )


def _heavy(of: Floats, means: tuple[float, float], rng: np.random.Generator) -> Ints:
    counts = of[:, None] ** (2 / 3) * np.exp(rng.standard_normal((len(of), 2))) * means
    return np.round(counts).astype(np.int64)


def _users(settings: WorldSettings, rng: np.random.Generator) -> Users:
    tasks, count = len(INTERACTIONS), settings.users
    further = np.random.default_rng([settings.seed, 7])  # the rest is as with a single taste
    shared = rng.standard_normal((count, 1))
    return Users(
        activity=rng.gamma(0.8, 1.0, count) + 0.05,
        tastes=tuple(
            (further if number else rng).standard_normal((count, FACTORS)) / np.sqrt(FACTORS)
            for number in range(settings.interests)
        ),
        style_taste=rng.standard_normal((count, FACTORS)) / np.sqrt(FACTORS),
        bias=0.35 * rng.standard_normal(count),
        propensity=0.5 * shared + 0.5 * rng.standard_normal((count, tasks)),
    )


def _videos(settings: WorldSettings, rng: np.random.Generator) -> Videos:
    count = settings.videos
    authors = max(2, count // 3)
    rank = rng.permutation(count)
    author = rng.integers(0, authors, count)
    author_factors = rng.standard_normal((authors, FACTORS))
    styles = rng.standard_normal((STYLES, FACTORS))
    style = rng.integers(0, STYLES, count)
    new = rng.random(count) >= UPLOADED_BEFORE
    before = -rng.integers(1, DAYS_BEFORE + 1, count)
    pull = 0.4 * rng.standard_normal((authors, len(INTERACTIONS)))
    return Videos(
        topic=rng.integers(0, TOPICS, count),
        style=style,
        author=author,
        upload_day=np.where(new, rng.integers(0, settings.days, count), before),
        duration_ms=_durations(rank, rng),
        popularity=np.reciprocal(rank.astype(np.float64) + 1.0 + ZIPF_OFFSET),
        own=np.sqrt(0.2) * author_factors[author]
        + np.sqrt(0.3) * rng.standard_normal((count, FACTORS)),
        style_factors=np.sqrt(0.7) * styles[style]
        + np.sqrt(0.3) * rng.standard_normal((count, FACTORS)),
        bias=0.35 * rng.standard_normal(count) + 0.25 * rng.standard_normal(authors)[author],
        author_pull=pull[author],
    )


def _durations(rank: Ints, rng: np.random.Generator) -> Ints:
    """Draw from a mixture of short and long, spread evenly over ranks of popularity.

    Multiples of the golden ratio fill the unit interval evenly, so that the durations that are
    seen have the same distribution in every world, however few videos carry the exposure.
    """
    u = (rng.random() + rank * (np.sqrt(5.0) - 1.0) / 2.0) % 1.0
    seconds = np.empty(len(rank))
    short = u < SHORT[0]
    for chosen, start, (fraction, median, spread) in (
        (short, 0.0, SHORT),
        (~short, SHORT[0], LONG),
    ):
        quantile = np.clip((u[chosen] - start) / fraction, 1e-9, 1 - 1e-9)
        seconds[chosen] = median * np.exp(spread * ndtri(quantile))
    return np.round(1000.0 * np.clip(seconds, SHORTEST_S, LONGEST_S)).astype(np.int64)
