import polars as pl
import pytest
from polars.testing import assert_frame_equal

from core_gates.errors import GatesError
from video_multitask.feed import add_context, add_labels, add_sides
from video_multitask.history import UserHistory, add_history
from video_multitask.kuairand.folder import KuaiRand
from video_multitask.kuairand.prepare import prepare
from video_multitask.stream.shards import open_shards, write_shards


@pytest.fixture(scope="module")
def shards(release, tmp_path_factory):
    history = UserHistory(6, ("video_id",), ("is_click",))
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    return prepare(KuaiRand(release), folder, history=history, row_group=256)


def test_shards_hold_all_rows_labelled_joined_and_with_their_past(feed, shards):
    log = pl.concat(shards.parts())
    assert len(log) == shards.rows == len(feed.log)
    key = ["time_ms", "user_id", "video_id"]
    data = add_labels(feed.log.select(c for c in feed.log.columns if c in log.columns))
    expected = add_history(data, 6, ("video_id",), ("is_click",)).sort(key)
    assert_frame_equal(log.sort(key).select(expected.columns), expected, check_dtypes=False)
    tags = log.join(
        feed.videos.select(pl.col("video_id").cast(pl.Int32), right="tag"), on="video_id"
    )
    assert tags["tag"].equals(tags["right"], null_equal=True)
    assert log["hour"].equals((log["hourmin"] // 100).cast(pl.Int8))


def test_files_are_days_and_ways_of_choosing(shards):
    for file in shards.files:
        rows = pl.concat(shards.select(file.date, file.date, file.random).parts())
        assert len(rows) == file.rows
        assert (set(rows["date"]), set(rows["is_rand"])) == ({file.date}, {int(file.random)})
        assert rows["time_ms"].is_sorted()
        assert set(file.groups[:-1]) <= {256}
    assert len({f.date for f in shards.files}) == 31
    assert shards.select(20220501).files[0].date == 20220501
    with pytest.raises(GatesError, match="has no rows from 20220601 to None with random=None"):
        shards.select(20220601)


def test_the_same_rows_give_the_same_bytes(feed, release, shards, tmp_path):
    history = UserHistory(6, ("video_id",), ("is_click",))
    again = prepare(KuaiRand(release), tmp_path / "again", history=history, row_group=256)
    assert again.files == shards.files
    whole = write_shards([feed.log], tmp_path / "whole", row_group=500)
    parts = write_shards(feed.log.iter_slices(777), tmp_path / "parts", row_group=500)
    assert whole.files == parts.files == open_shards(tmp_path / "parts", verify=True).files


def test_rows_out_of_order_are_refused(feed, tmp_path, refuses):
    refuses(
        GatesError,
        (
            "rows are not in time order",
            lambda: write_shards([feed.log[500:600], feed.log[:100]], tmp_path / "x"),
        ),
        ("there are no rows to write", lambda: write_shards([], tmp_path / "x")),
    )
    assert not (tmp_path / "x").exists()


def test_context_is_made_of_what_exists():
    log = pl.DataFrame(
        {
            "date": [20220410, 20220501],
            "hourmin": [1300, 0],
            "duration_ms": [None, 5],
            "upload_dt": ["2022-04-08", None],
            "tag": ["39,43", None],
        }
    )
    made = add_context(log)
    assert (made["weekday"].to_list(), made["hour"].to_list()) == ([7, 7], [13, 0])
    assert made["has_duration"].to_list() == [False, True]
    assert made["video_age_days"].to_list() == [2, None]
    assert made["first_tag"].to_list() == ["39", None]
    assert add_context(log.select("date")).columns == ["date", "weekday"]


def test_side_tables_must_not_repeat_columns_of_the_log():
    log = pl.DataFrame({"user_id": [1, 5, 1], "video_id": [0, 0, 1], "tab": [1, 2, 3]})
    users = pl.DataFrame({"user_id": [1, 2], "age": [10, 20]})
    assert add_sides(log, users, None)["age"].to_list() == [10, None, 10]
    with pytest.raises(
        GatesError, match="the table of video_id has the columns tab, which the log"
    ):
        add_sides(log, users, pl.DataFrame({"video_id": [0], "tab": [1]}))
