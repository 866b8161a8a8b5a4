import os
import shutil
import warnings
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from core_gates.errors import GatesError
from video_multitask.kuairand.folder import KuaiRand, read_table
from video_multitask.kuairand.prepare import part_of, split_log
from video_multitask.kuairand.releases import (
    LOG,
    RELEASES,
    USERS,
    VIDEOS,
    Count,
    check_counts,
    parse_name,
)

SHARED = Path(os.environ.get("GATES_SHARED", "shared")) / "data" / "recsys"
LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)


def test_an_export_is_read_back(feed, release):
    data = KuaiRand(release)
    assert data.release == "simulated"
    read = pl.concat(data.log()).sort("time_ms", "user_id", "video_id")
    assert_frame_equal(read, feed.log.select(list(LOG)).sort("time_ms", "user_id", "video_id"))
    users, videos = data.users(), data.videos()
    coded = feed.users.with_columns(
        pl.when(pl.col("is_live_streamer") != -124)
        .then("is_live_streamer")
        .alias("is_live_streamer")
    )
    assert_frame_equal(users, coded.select(users.columns), check_dtypes=False)
    assert_frame_equal(videos, feed.videos.select(videos.columns), check_dtypes=False)
    first = (release / "data" / "log_standard_4_08_to_4_21_simulated.csv").read_text()
    assert first.startswith(LOG_HEADER)
    kept = next(KuaiRand(release / "data", keep=("position",)).log(("first",)))
    assert kept["position"].to_list() == feed.log["position"][: len(kept)].to_list()


def test_logs_are_split_by_date_and_by_who_chose(feed, release):
    data = KuaiRand(release)
    sizes = [sum(map(len, data.log((part,)))) for part in ("first", "second", "random")]
    late, random = feed.log["date"] >= 20220422, feed.log["is_rand"] == 1
    assert sizes == [(~late).sum(), (late & ~random).sum(), (late & random).sum()]


def test_parts_of_a_log_are_read_one_after_the_other(release, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(release / "data", folder)
    name = "log_standard_4_08_to_4_21_simulated"
    lines = (folder / f"{name}.csv").read_text().splitlines(keepends=True)
    (folder / f"{name}.csv").unlink()
    (folder / f"{name}_part1.csv").write_text("".join(lines[:101]))
    (folder / f"{name}_part2.csv").write_text("".join([lines[0], *lines[101:]]))
    parts, whole = KuaiRand(tmp_path).log(("first",)), KuaiRand(release).log(("first",))
    assert_frame_equal(pl.concat(parts), pl.concat(whole))
    (folder / f"{name}_part1.csv").unlink()
    with pytest.raises(GatesError, match=r"part2.csv: part 2 comes after 0 parts; get the missing"):
        KuaiRand(tmp_path)


def test_counts_are_compared_with_the_published_ones(release, tmp_path):
    for path in (release / "data").iterdir():
        shutil.copy(path, tmp_path / path.name.replace("simulated", "pure"))
    data = KuaiRand(tmp_path)
    with pytest.warns(UserWarning, match=r"144 users, expected 27,285; 298 videos, expected 7,551"):
        overview = data.overview()
    assert overview.counts.users == 144
    with pytest.raises(
        GatesError, match=r"rows, expected 1,186,059 as published; get KuaiRand-pure"
    ):
        data.overview("random", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KuaiRand(release).overview(strict=True)
        for name, found in RELEASES.items():
            check_counts(name, "standard", found.standard, "here", strict=True)
    assert RELEASES["27k"].standard == Count(27_285, 32_038_725, 322_278_385)


def test_names_of_files_are_understood():
    assert parse_name("log_standard_4_22_to_5_08_27k_part2.csv") == (
        "log_standard_4_22_to_5_08", "27k", 2,
    )  # fmt: skip
    assert parse_name("video_features_basic_1k.parquet") == ("video_features_basic", "1k", 1)
    assert parse_name("log_standard_4_22_to_5_08.csv") is None
    assert parse_name("notes.txt") is None


@pytest.mark.fault("video V4")
def test_further_columns_of_a_quoted_header_are_found(release, tmp_path):
    """Files of R and many others enclose names in quotes."""
    first = next((release / "data").glob("log_standard*.csv"))
    log = pl.read_csv(first).with_columns(note=pl.lit("a,b"))
    log = log.rename({"note": "a note, with a comma"})
    for style in ("always", "necessary"):
        log.write_csv(tmp_path / f"{style}.csv", quote_style=style)
        free, taken = KuaiRand(tmp_path / f"{style}.csv").further()
        assert set(free) == set(log.columns) - set(LOG)
        assert not taken
        data = KuaiRand(tmp_path / f"{style}.csv", keep=free)
        assert pl.concat(data.log()).select(free).equals(log.select(free))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
def test_real_files_are_read():
    csv, parquet = (SHARED / f"kuairand1k_random_fixture.{s}" for s in ("csv", "parquet"))
    rows = pl.concat(KuaiRand(csv).log())
    assert_frame_equal(rows, pl.concat(KuaiRand(parquet).log()))
    assert (rows["duration_ms"].null_count(), rows["is_rand"].sum()) == (3, 46)
    overview = KuaiRand(SHARED / "kuairand27k_explicit_log.parquet").overview()
    assert overview.counts == (664, 9_359, 41_828)
    assert (overview.repeated, overview.without_duration) == (124, 7_738)
    users = pl.concat(read_table(SHARED / "kuairand_user_features.parquet", USERS))
    assert users["is_live_streamer"].null_count() == 21_127
    videos = pl.concat(read_table(SHARED / "kuairand_video_features_basic_pure.parquet", VIDEOS))
    assert users["user_id"].is_unique().all()
    assert videos["video_id"].is_unique().all()
    assert (len(videos), videos["tag"].null_count()) == (7_583, 96)


def test_a_split_loses_no_row_of_its_logs(feed):
    parts = feed.log.with_columns(part_of("standard"))
    assert parts["part"].null_count() == (feed.log["is_rand"] == 1).sum()
    both = feed.log.with_columns(part_of("unbiased"))["part"]
    assert ((both == "test") & (feed.log["is_rand"] == 1)).sum() == (both == "test").sum() > 0


def test_a_split_without_rows_is_refused(feed, refuses):
    refuses(
        GatesError,
        (
            "the split standard has no rows for test; the log must",
            lambda: split_log([feed.log.filter(pl.col("date") < 20220422)], "standard"),
        ),
        (
            "split is 'temporal'; choose one of standard, unbiased",
            lambda: split_log([feed.log], "temporal"),
        ),
    )
