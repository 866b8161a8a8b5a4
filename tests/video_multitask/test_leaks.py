import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.schema import Crossed, Dense, FeatureSchema, Sparse, Task
from video_multitask.history import UserHistory, add_history
from video_multitask.leaks import check_causal, check_features

TASKS = (Task("like", label="is_like"),)


def test_what_is_known_before_the_exposure_passes():
    check_features(FeatureSchema(TASKS, (Sparse("user_id"),), (Dense("past_mean_is_click"),)))


@pytest.mark.parametrize("name", ["play_time_ms", "comment_stay_time", "is_click", "complete"])
def test_what_is_known_after_the_exposure_is_refused(name):
    with pytest.raises(GatesError, match=f"{name} are known only after the video was shown"):
        check_features(FeatureSchema(TASKS, (Sparse("user_id"),), (Dense(name),)))
    crossed = FeatureSchema(
        TASKS, (Sparse("user_id"), Sparse(name)), crossed=(Crossed(("user_id", name)),)
    )
    with pytest.raises(GatesError, match=name):
        check_features(crossed)


def test_statistics_are_refused():
    schema = FeatureSchema(TASKS, dense=(Dense("stat_show_cnt"),))
    with pytest.raises(GatesError, match="stat_show_cnt are averages over the test period"):
        check_features(schema)


def test_the_history_is_causal_and_other_means_are_not(feed, refuses):
    log = feed.log[:3_000]
    history = UserHistory(5, ("video_id", "is_click"), ("is_click",))

    def causal(rows):
        return add_history(rows, 5, ("video_id", "is_click"), ("is_click",))

    check_causal(causal, log, history.names)

    def of_all_rows(rows):
        return rows.with_columns(rate=pl.col("is_click").mean().over("user_id"))

    def with_the_present(rows):
        order = rows.sort("user_id", "time_ms")
        own = order.with_columns(seen=pl.col("is_click").cum_sum().over("user_id"))
        return rows.join(own.select("user_id", "time_ms", "seen"), on=["user_id", "time_ms"],
                         how="left", maintain_order="left")  # fmt: skip

    refuses(
        GatesError,
        (
            "the feature rate of rows up to time_ms",
            lambda: check_causal(of_all_rows, log, ["rate"]),
        ),
        (
            "the feature seen of rows up to time_ms",
            lambda: check_causal(with_the_present, log, ["seen"], cuts=20),
        ),
    )
