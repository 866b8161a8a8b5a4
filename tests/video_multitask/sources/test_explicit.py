import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.metrics import auc
from recsys.transform import FeatureTransform
from video_multitask.leaks import check_causal
from video_multitask.sources.explicit import ExplicitLog

FOLDER = Path(os.environ.get("GATES_SHARED", "../shared")) / "data" / "recsys"
FILES = {
    "path": str(FOLDER / "kuairand27k_explicit_log.parquet"),
    "users_path": str(FOLDER / "kuairand_user_features.parquet"),
}


@pytest.fixture(scope="module")
def windows():
    if not Path(FILES["path"]).is_file():
        pytest.skip(f"{FILES['path']} is absent")
    return [ExplicitLog(**FILES, window=w).read() for w in (0, 3)]


def test_windows_test_two_days_after_the_day_that_validates(windows):
    for tables in windows:
        dates = [sorted(part["date"].unique().to_list()) for part in tables[2:5]]
        assert (len(dates[1]), len(dates[2])) == (1, 2)
        assert max(dates[0]) < dates[1][0] < dates[2][0]
    assert (len(windows[0].test), len(windows[1].test)) == (6102, 3835)


def test_no_id_and_no_outcome_of_the_row_is_a_feature(windows):
    features = set(windows[0].schema.features)
    now = {"is_click", "long_view", "is_like", "is_hate", "play_time_ms", "comment_stay_time"}
    assert not features & {*now, "user_id", "video_id", "outcome", "watched", "played"}


def test_history_is_strictly_earlier(windows):
    table = windows[1].train
    user = table["user_id"].value_counts(sort=True)["user_id"][0]
    own = table.filter(table["user_id"] == user).sort("time_ms")
    times, clicks = own["time_ms"].to_numpy(), own["is_click"].to_numpy()
    for row in (0, 7, len(own) // 2, len(own) - 1):
        earlier = times < times[row]
        mean = own["past_mean_is_click"][row]
        assert own["past_count"][row] == earlier.sum()
        if earlier.any():
            assert mean == pytest.approx(clicks[earlier].mean())
            assert len(own["past_event"][row]) == min(30, earlier.sum())
        else:
            assert mean is None


def test_no_feature_knows_the_present_or_the_future(windows):
    source = ExplicitLog(**FILES)
    log = source.log()
    log = log.filter(log["user_id"].is_in(log["user_id"].unique().sort()[:40].implode()))
    made = [n for n in source.schema().features if n.startswith(("past_", "recent_", "last_"))]
    assert len(made) == 39
    check_causal(source.features, log, [*made, "hours_since"])

    def leaking(rows):
        return source.features(rows).with_columns(
            past_count=pl.col("is_click").sum().over("user_id")
        )

    with pytest.raises(GatesError, match="past_count of rows up to"):
        check_causal(leaking, log, ["past_count"])


def test_controls_permute_before_features_and_plant_a_leak(windows):
    honest, permuted = ExplicitLog(**FILES).log(), ExplicitLog(**FILES, permuted=True).log()
    names = ("is_click", "long_view", "is_like", "play_time_ms")
    assert honest.select("user_id", "time_ms").equals(permuted.select("user_id", "time_ms"))
    assert np.corrcoef(honest["is_click"], permuted["is_click"])[0, 1] == pytest.approx(0, abs=0.02)
    assert honest.select(names).sort(names).equals(permuted.select(names).sort(names))
    source = ExplicitLog(**FILES, permuted=True, leak="is_click")
    table = source.read().test
    assert auc(table["leak"].to_numpy(), table["is_click"].to_numpy()).value > 0.9
    assert "leak" in source.schema().features
    assert auc(
        table["past_mean_is_click"].fill_null(0.5).to_numpy(), table["is_click"].to_numpy()
    ).value == pytest.approx(0.5, abs=0.03)


def test_events_of_a_history_have_rows_of_their_own(windows):
    tables = windows[0]
    batch = FeatureTransform(tables.schema).fit(tables.train).batch(tables.test)
    events = batch.sequences[0].numpy()
    seen = events[events != 1]
    assert (seen == 0).mean() < 0.001  # unknown
    assert len(np.unique(seen)) > 20


def test_a_window_that_is_none():
    with pytest.raises(ValueError, match="choose one of 0 to 3"):
        ExplicitLog(**FILES, window=4)


@pytest.mark.fault("46 R8")
def test_labels_by_rule_are_those_of_the_play_time(windows):
    del windows  # skipped with them
    options = {"windows": 1, "window": 0, "days": 5, "encoder": "none"}
    labels, number = (ExplicitLog(**FILES, **options, play_time=p).read() for p in (False, True))
    assert sum(len(part) for part in labels[2:5]) == 34_090
    assert number.test.equals(labels.test)
    batches = [FeatureTransform(t.schema).fit(t.train).batch(t.test) for t in (labels, number)]
    assert batches[0].labels.equal(batches[1].labels)
    assert batches[1].mask.all()
    assert batches[0].numbers is None or not batches[0].numbers.numel()
    assert not {"play_time_ms", "effective_view"} & set(number.schema.features)
