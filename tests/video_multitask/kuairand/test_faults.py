"""Broken and unusual files: one line with file, line and column, or the documented handling."""

import shutil

import polars as pl
import pytest

from core_gates.errors import GatesError
from video_multitask.kuairand.folder import KuaiRand
from video_multitask.kuairand.prepare import prepare
from video_multitask.sources.kuairand import KuaiRandTables
from video_multitask.stream.shards import open_shards

HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)
ROW = "3,17,20220409,1300,1649480400000,1,0,0,0,0,0,1,9000,8000,0,0,0,0,1"
NAMES = HEADER.split(",")


def row(**changes):
    values = dict(zip(NAMES, ROW.split(","), strict=True)) | {k: str(v) for k, v in changes.items()}
    return ",".join(values.values())


def read(path, **options):
    return pl.concat(KuaiRand(path, **options).log())


@pytest.fixture
def log(tmp_path):
    def write(*lines, name="log.csv", header=HEADER):
        path = tmp_path / name
        path.write_text("\n".join([header, *lines]) + "\n")
        return path

    return write


FAULTS = {
    "text for a number": (row(tab="home"), "line 3, column tab: 'home' is not a whole number"),
    "a fraction": (row(play_time_ms="3.5"), "line 3, column play_time_ms: '3.5' is not a whole"),
    "a huge number": (row(video_id="9" * 20), "line 3, column video_id: '9999"),
    "a negative id": (row(user_id=-1), "line 3, column user_id: -1, expected a whole number from"),
    "a flag of 2": (row(is_like=2), "line 3, column is_like: 2, expected a whole number from 0 to"),
    "an empty field": (row(video_id=""), "line 3, column video_id: nothing, expected a whole"),
    "a negative time": (row(time_ms=-5), "line 3, column time_ms: -5, expected"),
    "seconds": (row(time_ms=1649480400), "line 3, column time_ms: 1649480400, expected"),
    "a negative play time": (row(play_time_ms=-1), "line 3, column play_time_ms: -1, expected"),
    "a tab of 15": (row(tab=15), "line 3, column tab: 15, expected a whole number from 0 to 14"),
    "another year": (row(date=20230409), "line 3, column date: 20230409, expected"),
    "a field too few": (ROW.rpartition(",")[0], "line 3: 18 fields, expected the 19 of the header"),
    "a field too many": (ROW + ",9", "line 3: 20 fields, expected the 19 of the header"),
}


@pytest.mark.parametrize(("line", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_wrong_values_are_named(log, line, message):
    path = log(ROW, line, ROW)
    with pytest.raises(GatesError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_are_counted_over_all_parts_of_a_file(log, monkeypatch):
    monkeypatch.setattr("video_multitask.kuairand.folder._BYTES_AT_ONCE", 4_096)
    path = log(*[ROW] * 500, row(is_hate=7), *[ROW] * 500)
    with pytest.raises(GatesError, match="line 502, column is_hate: 7"):
        read(path)
    path = log(*[ROW] * 500, row(is_hate="x"), *[ROW] * 500)
    with pytest.raises(GatesError, match="line 502, column is_hate: 'x'"):
        read(path)


def test_wrong_rows_can_be_left_out(log):
    path = log(ROW, row(user_id=-1), row(is_like=2, user_id=9), row(user_id=5))
    assert read(path, drop_invalid=True)["user_id"].to_list() == [3, 5]


@pytest.mark.fault("video V7")
@pytest.mark.parametrize("day", [20220431, 20220499, 20220500])
def test_days_that_no_calendar_has_are_named_or_left_out(day, log, tmp_path):
    path = log(ROW, row(date=day), row(date=20220430, user_id=5))
    wanted = f"line 3, column date: {day}, expected a date from 20220408 to 20220508"
    with pytest.raises(GatesError, match=wanted):
        prepare(KuaiRand(path), tmp_path / "shards")
    assert prepare(KuaiRand(path, drop_invalid=True), tmp_path / "shards").rows == 2


def test_files_without_rows_are_refused(tmp_path, log, refuses):
    empty = tmp_path / "empty.csv"
    empty.touch()
    refuses(
        GatesError,
        (r"empty.csv is empty; a header and rows were expected", lambda: read(empty)),
        (r"log.csv has a header and no rows", lambda: read(log())),
        (
            r"nothing.csv does not exist: name a KuaiRand .* --download pure",
            lambda: KuaiRand(tmp_path / "nothing.csv"),
        ),
    )


def test_headers_are_checked(log):
    missing = HEADER.replace("is_click,", "")
    with pytest.raises(GatesError, match="line 1: columns is_click are missing; found user_id"):
        read(log(ROW, header=missing))
    twice = HEADER.replace("is_like", "is_click")
    with pytest.raises(GatesError, match="line 1: column 'is_click' occurs twice"):
        read(log(ROW, header=twice))


def test_shuffled_and_further_columns_change_nothing(log):
    expected = read(log(ROW, row(user_id=4)))
    order = NAMES[::-1]
    shuffled = [
        ",".join([*(dict(zip(NAMES, line.split(","), strict=True))[n] for n in order), '"a,b"'])
        for line in (ROW, row(user_id=4))
    ]
    path = log(*shuffled, name="b.csv", header=",".join([*order, "note"]))
    assert read(path).equals(expected)
    assert read(path, keep=("note", "absent"))["note"].to_list() == ["a,b", "a,b"]


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(log, tmp_path):
    expected = read(log(ROW, row(user_id=4)))
    text = "\r\n".join(["\ufeff" + HEADER, ROW, row(user_id=4)])
    path = tmp_path / "windows.csv"
    path.write_bytes(text.encode("utf-8"))
    assert read(path).equals(expected)


def test_missing_durations_and_loops_are_kept(log):
    rows = read(log(row(duration_ms=0), row(play_time_ms=900_000), ROW))
    assert rows["duration_ms"].to_list() == [None, 8_000, 8_000]
    assert rows["play_time_ms"].to_list() == [9_000, 900_000, 9_000]
    assert rows["is_click"].to_list() == [1, 1, 1]


def test_times_out_of_order_and_repeated_rows_are_counted_and_sorted(log, tmp_path):
    path = log(ROW, row(time_ms=1649480300000), ROW)
    overview = KuaiRand(path).overview()
    assert (overview.unordered, overview.repeated) == (1, 1)
    shards = prepare(KuaiRand(path), tmp_path / "shards")
    times = [t for part in shards.parts(["time_ms"]) for t in part["time_ms"]]
    assert times == [1649480300000, 1649480400000, 1649480400000]


def test_damaged_parquet_is_refused(log, tmp_path):
    path = tmp_path / "log.parquet"
    read(log(ROW)).write_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(GatesError, match=r"log.parquet cannot be read: it is not a complete"):
        read(path)
    read(log(ROW)).with_columns(tab=pl.lit("home")).write_parquet(path)
    with pytest.raises(
        GatesError, match=r"log.parquet, column tab: holds String, expected numbers"
    ):
        read(path)
    read(log(ROW)).drop("is_hate").write_parquet(path)
    with pytest.raises(GatesError, match="columns is_hate are missing"):
        read(path)


@pytest.fixture
def copy(release, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(release, folder)
    return folder


def test_side_tables_are_checked(copy):
    path = copy / "data" / "user_features_simulated.csv"
    lines = path.read_text().splitlines()
    assert any('"(' not in line and "(10,50]" in line for line in lines) is False  # quoted ranges
    users = KuaiRand(copy).users()
    assert users["follow_user_num_range"].str.contains(",").any()
    assert users["is_live_streamer"].min() == 1  # −124 is missing
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(GatesError, match="line 2, column user_id: 0 occurs in more than one row"):
        KuaiRand(copy).users()
    cells = lines[1].split(",")
    cells[2] = "-7"
    path.write_text("\n".join([lines[0], ",".join(cells)]) + "\n")
    with pytest.raises(
        GatesError, match=r"column is_lowactive_period: -7.0, .* or -124 \(missing\)"
    ):
        KuaiRand(copy).users()


def test_incomplete_and_mixed_folders_are_refused(copy, tmp_path, refuses):
    data = copy / "data"
    shutil.copy(data / "user_features_simulated.csv", data / "user_features_1k.csv")
    with pytest.raises(GatesError, match="mixes the releases 1k, simulated, whose ids differ"):
        KuaiRand(copy)
    (data / "user_features_1k.csv").unlink()
    (data / "log_standard_4_08_to_4_21_simulated.csv").unlink()
    refuses(
        GatesError,
        ("0 of 1 files log_standard_4_08_to_4_21_simulated", lambda: KuaiRand(copy)),
        ("holds no log of KuaiRand", lambda: KuaiRand(tmp_path)),
    )


@pytest.mark.fault("video V21")
def test_shards_that_changed_are_refused(log, tmp_path, refuses):
    folder = tmp_path / "shards"
    prepare(KuaiRand(log(ROW, row(user_id=8))), folder)
    path = folder / "20220409.parquet"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    open_shards(folder)
    refuses(
        GatesError,
        (
            r"20220409.parquet has SHA-256 .*; prepare it again",
            lambda: open_shards(folder, verify=True),
        ),
        (
            r"20220409.parquet has SHA-256 .*; prepare it again",
            lambda: KuaiRandTables(str(folder), ids=False).read(),
        ),
    )
    path.write_bytes(content[:-7])
    with pytest.raises(GatesError, match=r"20220409.parquet has \d+ bytes, expected \d+"):
        open_shards(folder)
    path.unlink()
    with pytest.raises(GatesError, match=r"20220409.parquet is missing, but listed"):
        open_shards(folder)
    (folder / "manifest.json").write_text("[]")
    refuses(
        GatesError,
        ("is not a manifest of shards", lambda: open_shards(folder)),
        (r"has no manifest.json; name a folder that was prepared", lambda: open_shards(tmp_path)),
    )


def test_a_failed_conversion_leaves_the_old_one(log, tmp_path):
    folder = tmp_path / "shards"
    before = prepare(KuaiRand(log(ROW)), folder)
    with pytest.raises(GatesError, match="column is_hate: 7"):
        prepare(KuaiRand(log(ROW, row(is_hate=7))), folder)
    assert open_shards(folder, verify=True) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "shards"]
