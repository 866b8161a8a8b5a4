"""A simulated feed: who sees what, what happens, and the true probabilities of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least, check_option
from video_multitask.feed import WATCH_RULES, follows
from video_multitask.simulator.exposure import (
    Catalog,
    Expected,
    Exposure,
    Outcomes,
    Visits,
    draw_exposure,
    draw_outcomes,
    draw_visits,
    hour_effect,
    intercepts,
    slopes,
    truth,
)
from video_multitask.simulator.hidden import (
    AFFINITY,
    BASE_RATES,
    BLOCK,
    DAY_MS,
    DURATION,
    HOUR,
    INTERACTIONS,
    POSITION,
    START_MS,
    WorldSettings,
    draw_hidden,
)

FIRST_DATE = np.datetime64("2022-04-08")
Policy = Literal["logged", "uniform"]
Ints = NDArray[np.integer]
_PILOT_ROWS = 2**15
_WORLD, _PILOT, _LOG = 1, 2, 3


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
            "date": np.full(len(play), int(f"{FIRST_DATE + day}".replace("-", "")), dtype=np.int32),
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


class Chunk(NamedTuple):
    """Rows of a log (n) and the true probabilities of their tasks (n, 14)."""

    log: pl.DataFrame
    truth: NDArray[np.float32]


class World:
    """Users, videos and tastes; logs are drawn from it, any number of them.

    The interest of a user u in a video v is

        w = 0.9 a(u, v) − 0.25 log(duration / 20 s) − 0.03 position + hour + noise,

    with the affinity a = max ⟨taste, factors⟩ + quality + bias over the tastes of the user, one by
    default, of mean 0 and variance 1 over what is shown. It is played for
    duration · exp(0.9 w − 0.7), from which the watch labels follow by the rules of
    `video_multitask.feed`; interaction t happens with probability
    σ(b_t + c_t w + taste A_t factors + author + propensity), of the taste that counts, where b_t
    gives the wanted base rate.

    Factors of a video are those of its topic, which walks randomly by day, of its author and its
    own. Activity of users is gamma distributed, popularity of videos follows Zipf and Mandelbrot,
    ∝ 1 / (rank + 10). Candidates of a row are 50 videos by popularity, uploaded by that day; the
    video shown is drawn by a softmax of noisy affinities. 0.37 % of rows show any video, uniformly.

    Args:
        settings: Sizes, kind and seed.

    Attributes:
        settings: As given.
        hidden: Tastes, topics, authors and propensities.
    """

    def __init__(self, settings: WorldSettings) -> None:
        self.settings, self.hidden = settings, draw_hidden(settings)
        self._catalog = lru_cache(maxsize=1)(lambda day: Catalog(self.hidden, day))
        self._center, self._scale = 0.0, 1.0
        self._intercepts = np.zeros(len(BASE_RATES))
        self._calibrate()

    def stream(
        self, rows: int, *, draw: int = 0, policy: Policy = "logged", chunk: int = BLOCK
    ) -> Iterator[Chunk]:
        """Draw a log in time order, part by part, in bounded memory.

        Args:
            rows: Rows of the whole log, spread evenly over the days.
            draw: Number of the log; every one has other sessions, videos and outcomes.
            policy: ``uniform`` chooses among the same candidates of the same users uniformly.
            chunk: Rows of each part, the last one excepted; they are the same in any partition.

        Raises:
            GatesError: ``policy`` is unknown, or there are fewer rows than days.
            ValueError: A number is too small.
        """
        check_option("policy", policy, ("logged", "uniform"), GatesError)
        check_at_least(1, rows=rows, chunk=chunk)
        if rows < self.settings.days:
            raise GatesError(
                f"{rows} rows are fewer than {self.settings.days} days: simulate more rows, or "
                "fewer days"
            )
        check_at_least(0, draw=draw)
        return self._rechunk(self._blocks(rows, draw, policy), chunk)

    def _blocks(self, rows: int, draw: int, policy: Policy) -> Iterator[Chunk]:
        settings = self.settings
        for day in range(settings.days):
            visits = self._visits(rows, day, _LOG, draw)
            for number, start in enumerate(range(0, len(visits.user), BLOCK)):
                part = visits.take(slice(start, start + BLOCK))
                rng = self._rng(_LOG, draw, day, number)
                tastes = self.hidden.users.tastes_of(part.user)
                uniform = policy == "uniform"
                shown = draw_exposure(self._catalog(day), tastes, rng, uniform=uniform)
                expected = self._expected(part, shown.video, day)
                outcomes = draw_outcomes(expected, rng)
                log = log_columns(part, shown, expected.duration_ms, outcomes, day, rng)
                yield Chunk(self._with_counts(log), truth(expected))

    def _visits(self, rows: int, day: int, kind: int, draw: int = 0) -> Visits:
        days = self.settings.days
        count = rows * (day + 1) // days - rows * day // days
        return draw_visits(count, self.hidden.users.activity, self._rng(kind, draw, day))

    def _expected(self, visits: Visits, video: Ints, day: int) -> Expected:
        users, videos, groups = self.hidden.users, self.hidden.videos, self.settings.groups
        taste = self._taste(visits.user, video, day)
        factors = self._catalog(day).factors[video, :-1].astype(np.float64)
        affinity = (self._raw_affinity(visits.user, video, day) - self._center) / self._scale
        duration = videos.duration_ms[video]
        hour = visits.ms // 3_600_000
        interest = AFFINITY * affinity + DURATION * np.log(duration / 20_000.0)
        interest += POSITION * visits.position + hour_effect(hour, HOUR)
        logits = videos.author_pull[video] + users.propensity[visits.user] + self._intercepts
        if groups:
            taste, factors = users.style_taste[visits.user], videos.style_factors[video]
            logits = logits + self.hidden.tab_pull[visits.tab]
        directed = np.einsum("nk,tkj->ntj", taste, self.hidden.interaction, optimize=True)
        logits = logits + np.einsum("ntj,nj->nt", directed, factors)
        return Expected(interest, logits, slopes(groups), duration)

    def _raw_affinity(self, user: Ints, video: Ints, day: int) -> NDArray[np.float64]:
        users, factors = self.hidden.users, self._catalog(day).factors[video]
        return (
            np.einsum("nk,nk->n", self._taste(user, video, day), factors[:, :-1])
            + factors[:, -1]
            + users.bias[user]
        )

    def _taste(self, user: Ints, video: Ints, day: int) -> NDArray[np.float64]:
        """Return the taste of each user (n, 8) that fits the video best."""
        tastes, factors = self.hidden.users.tastes_of(user), self._catalog(day).factors[video, :-1]
        fits = [np.einsum("nk,nk->n", taste, factors) for taste in tastes]
        return np.choose(np.argmax(fits, 0)[:, None], tastes)

    def _calibrate(self) -> None:
        """Standardize the affinity and set the intercepts, over a pilot log of all days."""
        shown = []
        for day in range(self.settings.days):
            visits = self._visits(_PILOT_ROWS, day, _PILOT)
            tastes = self.hidden.users.tastes_of(visits.user)
            rng = self._rng(_PILOT, 0, day, 0)
            video = draw_exposure(self._catalog(day), tastes, rng, uniform=False).video
            shown.append((visits, video, self._raw_affinity(visits.user, video, day)))
        raw = np.concatenate([affinity for _, _, affinity in shown])
        self._center, self._scale = float(raw.mean()), float(raw.std())
        parts = [self._expected(visits, video, day) for day, (visits, video, _) in enumerate(shown)]
        joined = [np.concatenate([part[k] for part in parts]) for k in (0, 1, 3)]
        expected = Expected(joined[0], joined[1], parts[0].slopes, joined[2])
        self._intercepts = intercepts(expected, np.array(list(BASE_RATES.values())))

    def _with_counts(self, log: pl.DataFrame) -> pl.DataFrame:
        if not self.settings.heavy_counts:
            return log
        user, video = log["user_id"].to_numpy(), log["video_id"].to_numpy()
        counts = self.hidden.counts
        return log.with_columns(
            user_play_count=counts.user[user, 0],
            user_fan_count=counts.user[user, 1],
            video_show_count=counts.video[video, 0],
            video_comment_count=counts.video[video, 1],
        )

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self.settings.seed, *key]))

    @staticmethod
    def _rechunk(blocks: Iterator[Chunk], size: int) -> Iterator[Chunk]:
        logs: list[pl.DataFrame] = []
        truths: list[NDArray[np.float32]] = []
        waiting = 0
        for block in blocks:
            logs.append(block.log)
            truths.append(block.truth)
            waiting += len(block.log)
            if waiting < size:
                continue
            log, true = pl.concat(logs), np.concatenate(truths)
            full = waiting // size * size
            for start in range(0, full, size):
                yield Chunk(log[start : start + size], true[start : start + size])
            logs, truths, waiting = [log[full:]], [true[full:]], waiting - full
        if waiting:
            yield Chunk(pl.concat(logs), np.concatenate(truths))
