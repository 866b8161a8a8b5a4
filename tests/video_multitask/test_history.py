from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from core_gates.errors import GatesError
from video_multitask.history import UserHistory, add_history

LISTS, MEANS = ("video_id", "is_click"), ("is_click", "duration_ms")


def naive(log, length):
    """The definition, row by row."""
    rows = log.to_dicts()
    found = []
    for row in rows:
        earlier = [
            (r["time_ms"], k, r)
            for k, r in enumerate(rows)
            if r["user_id"] == row["user_id"] and r["time_ms"] < row["time_ms"]
        ]
        past = [r for *_, r in sorted(earlier, key=lambda item: item[:2])]
        durations = [r["duration_ms"] for r in past if r["duration_ms"] is not None]
        last = past[-length:] if length else []
        found.append(
            {
                "past_video_id": [r["video_id"] for r in last],
                "past_is_click": [r["is_click"] for r in last],
                "past_mean_is_click": np.mean([r["is_click"] for r in past]) if past else None,
                "past_mean_duration_ms": np.mean(durations) if durations else None,
                "past_count": len(past),
            }
        )
    return found


events = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 9), st.integers(0, 12), st.booleans(),
        st.one_of(st.none(), st.integers(1, 9)),
    ),
    min_size=1, max_size=40,
)  # fmt: skip


def frame(rows):
    user, video, time, click, duration = zip(*rows, strict=True)
    return pl.DataFrame(
        {
            "user_id": user,
            "video_id": video,
            "time_ms": time,
            "is_click": [int(c) for c in click],
            "duration_ms": pl.Series(duration, dtype=pl.Int64),
        }
    )


def compare(added, expected):
    for name in expected[0]:
        column = added[name].to_list()
        for found, wanted in zip(column, [row[name] for row in expected], strict=True):
            if isinstance(wanted, float):
                assert found == pytest.approx(wanted, abs=1e-12)
            else:
                assert found == wanted, name


@given(events, st.integers(0, 4))
def test_features_are_those_of_the_definition(rows, length):
    log = frame(rows)
    added = add_history(log, length, LISTS, MEANS)
    assert added.select(log.columns).equals(log)
    compare(added, naive(log, length))


@given(events, st.integers(0, 3), st.lists(st.integers(1, 12), max_size=3))
def test_parts_give_what_the_whole_log_gives(rows, length, cuts):
    log = frame(rows).sort("time_ms", maintain_order=True)
    whole = add_history(log, length, LISTS, MEANS)
    history = UserHistory(length, LISTS, MEANS)
    edges = [0, *sorted(set(cuts)), 99]
    parts = [
        history.add(log.filter(pl.col("time_ms").is_between(a, b - 1))) for a, b in pairwise(edges)
    ]
    joined = pl.concat(part for part in parts if len(part))
    assert joined.columns == [*log.columns, *history.names]
    assert_frame_equal(joined, whole)


def test_means_know_no_other_user():
    rng = np.random.default_rng(0)
    log = pl.DataFrame(
        {"user_id": np.repeat([1, 2], 50), "time_ms": np.arange(100), "watched": rng.random(100)}
    )
    worse = log.with_columns(
        pl.when(pl.col("user_id") == 1)
        .then(pl.col("watched") * 1e12 + np.pi)
        .otherwise("watched")
        .alias("watched")
    )
    worse[7, "watched"] = np.nan
    first, second = (
        add_history(one, 0, (), ("watched",))["past_mean_watched"] for one in (log, worse)
    )
    assert first[50:].equals(second[50:], null_equal=True)
    assert second.null_count() == 2
    assert second[9] == pytest.approx(np.nanmean(worse["watched"][:9].to_numpy()))


def test_parts_out_of_order_are_refused(refuses):
    log = frame([(0, 1, 5, True, 3), (0, 2, 9, False, 3)])
    history = UserHistory(2)
    history.add(log)
    refuses(
        GatesError,
        (r"a row at time_ms 9 comes after one at 9; parts must", lambda: history.add(log[1:])),
        (
            "the log lacks is_like, which its history is made of",
            lambda: add_history(log, 2, ("is_like",)),
        ),
    )
    with pytest.raises(ValueError, match="length must not be negative"):
        UserHistory(-1)
