import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endoscopy.data.frame_table import (
    REQUIRED,
    FrameTable,
    concatenate,
    look_like_centimeters,
    parse_size,
    repair_boxes,
)
from endoscopy.data.readers.real_colon import read_real_colon
from endoscopy.data.readers.sun import read_sun
from endoscopy.data.readers.tabular import read_frame_table


def test_objects_come_numbers_first(make_table):
    table = make_table({"10": 6, "b_1": 4, "9": 12, "a_2": 3}, frames=2)
    assert table.unique_ids == ("9", "10", "a_2", "b_1")
    assert table.object_codes.tolist() == [1, 1, 3, 3, 0, 0, 2, 2]
    assert table.objects["gt"].tolist() == [12, 6, 3, 4]
    rows = table.take([4, 0])
    assert (rows.frames["unique_id"].tolist(), rows.frames.index.tolist()) == (["9", "10"], [0, 1])


def test_a_lesion_without_patient_is_its_own(make_table):
    table = make_table({"a": 6, "b": 4}, frames=1, patients={"a": "", "b": "p"})
    assert table.patients.tolist() == ["a", "p"]


def test_required_columns_are_required(make_table, refused):
    frames = make_table({"a": 6}).frames
    for name in REQUIRED:
        refused(f"lack the columns {name}", FrameTable, frames.drop(columns=name), error=ValueError)
    refused("hold no row", FrameTable, frames.iloc[:0], error=ValueError)


def test_macros_are_expanded_by_roots_then_by_the_environment(
    make_table, monkeypatch, tmp_path, refused
):
    table = make_table({"a": 6})
    monkeypatch.delenv("SYNTHETIC_PATH", raising=False)
    refused(r"needs \$SYNTHETIC_PATH, which has no value", table.path, 0)
    monkeypatch.setenv("SYNTHETIC_PATH", "/elsewhere")
    assert str(table.path(1)) == "/elsewhere/a_1.jpg"
    here = FrameTable(table.frames, {"SYNTHETIC_PATH": str(tmp_path)})
    assert here.path(1) == tmp_path / "a_1.jpg"
    assert here.path(1, "mask_path") is None
    braces = table.frames.assign(frame_path="${SYNTHETIC_PATH}/x.jpg")
    assert FrameTable(braces, {"SYNTHETIC_PATH": "/r"}).path(0).as_posix() == "/r/x.jpg"


@pytest.fixture
def both(real_colon, sun, tmp_path):
    """Tables of both fake data sets, joined."""
    table, _ = read_real_colon(real_colon.official(tmp_path / "colon", targets=True))
    other, _ = read_sun(sun.official(tmp_path / "sun"))
    return concatenate([table, other])


def test_parquet_round_trip_keeps_every_value(both, tmp_path):
    path = both.write_parquet(tmp_path / "out" / "frames.parquet")
    assert [p.name for p in path.parent.iterdir()] == ["frames.parquet"]
    read, report = read_frame_table(path, both.roots)
    columns = sorted(both.frames.columns)
    assert sorted(read.frames.columns) == columns
    filled = both.frames[columns].copy()
    for name in filled.columns:
        if read.frames[name].dtype == object or str(read.frames[name].dtype) == "str":
            filled[name] = filled[name].fillna("")
    pd.testing.assert_frame_equal(read.frames[columns], filled, check_dtype=False)
    assert (report.found, report.findings) == (len(both), {})
    assert both.path(0, "mask_path").exists()
    assert read.path(0, "mask_path") == both.path(0, "mask_path")
    assert read.censored.sum() == both.censored.sum() > 0


def write_parts(table, folder, rows):
    """Write ``polypsizing_{real,sun}_part{k}.csv`` as the preprocessor of the data does."""
    folder.mkdir(exist_ok=True)
    for database, frames in table.frames.groupby("database", sort=False):
        name = {"SUN": "sun", "REALC": "real"}.get(database, "synthetic")
        for part, start in enumerate(range(0, len(frames), rows)):
            path = folder / f"polypsizing_{name}_part{part}.csv"
            frames.iloc[start : start + rows].to_csv(path, index=False)
            yield path


def test_csv_parts_round_trip_in_numerical_order(both, tmp_path):
    paths = list(write_parts(both, tmp_path / "parts", rows=5))
    names = [path.name for path in paths]
    assert "polypsizing_real_part10.csv" not in names[:2]
    assert {"polypsizing_real_part0.csv", "polypsizing_sun_part8.csv"} <= set(names)
    assert max(len(pd.read_csv(path)) for path in paths) == 5
    read, report = read_frame_table(tmp_path / "parts", both.roots)
    columns = list(REQUIRED)
    pd.testing.assert_frame_equal(read.frames[columns], both.frames[columns], check_dtype=False)
    assert (report.files, report.findings) == (both.frames["frame_path"].nunique(), {})


def test_frames_of_a_part_file_come_in_the_order_of_part_numbers(make_table, tmp_path):
    table = make_table({f"{k}": 6 for k in range(12)}, frames=1)
    assert len(list(write_parts(table, tmp_path, rows=1))) == 12
    read, _ = read_frame_table(tmp_path, check_images=False)
    assert read.frames["unique_id"].tolist() == [str(k) for k in range(12)]


def test_tables_that_share_an_object_are_not_joined(make_table, refused):
    refused(
        "object b is in two tables",
        concatenate,
        [make_table({"a": 3, "b": 4}), make_table({"b": 5, "c": 6})],
    )
    first = FrameTable(make_table({"a": 3}).frames, {"SYNTHETIC_PATH": "/x"})
    second = FrameTable(make_table({"b": 3}).frames, {"SYNTHETIC_PATH": "/y"})
    refused("SYNTHETIC_PATH is /x in one table and /y", concatenate, [first, second])


def test_a_report_is_json(both, tmp_path):
    both.frames.loc[0, "gt"] = np.nan
    _, report = read_frame_table(both.write_parquet(tmp_path / "a.parquet"), both.roots)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["found"] - content["kept"] == 1
    assert content["findings"][0]["reason"] == "size is missing"
    assert content["findings"][0]["places"] == ["001-001_1 frame 1"]
    assert any("size is missing (001-001_1 frame 1)" in line for line in report.lines())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "cannot be read"),
        ("a.csv", b"unique_id,gt\n1,2\n", "lacks the columns database"),
        ("a.csv", b"\xff\xfe\x00bad", "byte 1 is not UTF-8"),
        ("a.csv", b'a,b\n"1,2\n3', "cannot be read"),
        ("a.parquet", b"PAR1 nothing", "prepare it again"),
        ("nowhere.csv", None, "cannot be read"),
        ("nowhere.parquet", None, "cannot be read"),
        (".", None, "holds no polypsizing"),
    ],
)
def test_files_that_are_no_table_are_refused(name, content, words, tmp_path, refused):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused(words, read_frame_table, path)


@pytest.mark.parametrize(
    ("text", "mm", "censored"),
    [
        ("6mm", 6.0, False),
        ("15mm-", 15.0, True),
        ("15 mm -", 15.0, True),
        ("≥15", 15.0, True),
        (">= 15mm", 15.0, True),
        ("20+", 20.0, True),
        (" 4.5 MM ", 4.5, False),
        ("4,5", 4.5, False),
        ("1.2 cm", 12.0, False),
        (7, 7.0, False),
        (2.25, 2.25, False),
    ],
)
def test_sizes_as_data_sets_write_them(text, mm, censored):
    size = parse_size(text)
    assert (size.mm, size.censored, size.fault) == (pytest.approx(mm), censored, "")


MISSING = dict.fromkeys([None, "", "NaN", math.nan, " n/a", "-", "None", "unknown"], "is missing")
TEXT = ["large", "3-5mm", "6mm8", "- x", "1e1", "inf", "mm", "5 5"]
IMPOSSIBLE = ["0", "0mm", 201, "99cm", -3, "-3mm", "-4"]
FAULTS = MISSING | dict.fromkeys(TEXT, "cannot be read")
FAULTS |= dict.fromkeys(IMPOSSIBLE, "not between 0 and 200 mm")


@pytest.mark.fault("endoscopy D21")
@pytest.mark.parametrize("value", FAULTS)
def test_what_is_no_size_has_a_fault(value):
    size = parse_size(value)
    assert FAULTS[value] in size.fault
    assert math.isnan(size.mm) or value not in MISSING


@given(st.floats(0.01, 200, allow_nan=False).map(lambda v: round(v, 3)), st.booleans())
def test_any_size_survives_its_text(mm, censored):
    size = parse_size(f"{mm}mm{'-' if censored else ''}")
    assert (size.mm, size.censored, size.fault) == (mm, censored, "")


@pytest.mark.fault("endoscopy D21")
@pytest.mark.parametrize(
    ("sizes", "centimeters"),
    [
        ([0.3, 0.5, 0.6, 1.0, 2.0, 4.5], True),
        ([2.0, 3.0, 4.0, 6.0, 12.0], False),
        ([1.0, 1.0, 1.5, 2.0, 7.0], False),
        ([0.4, 0.6], False),
        ([2.0, 2.5, 3.0, 3.0, 4.0], False),
    ],
)
def test_sizes_in_centimeters_are_known_by_their_looks(sizes, centimeters):
    assert look_like_centimeters(sizes) == centimeters


FRAME = [[100.0, 80.0]]
corner = st.floats(-300, 300, allow_nan=False)


def repair(*box, annotated=FRAME, actual=FRAME):
    return repair_boxes(np.array([box]), np.array(annotated), np.array(actual))


@pytest.mark.parametrize(
    ("box", "small"),
    [
        ((0, 4, 0, 4), False),
        ((0, 4, 0, 3.99), True),
        ((99, 140, 0, 80), False),
        ((100, 140, 0, 80), True),
        ((97, 140, 0, 5), True),
    ],
)
def test_sixteen_square_pixels_must_be_inside(box, small):
    assert repair(*box).small.tolist() == [small]


@pytest.mark.parametrize(
    ("box", "annotated", "expected", "flags"),
    [
        ((10, 20, 30, 50), FRAME, [10, 20, 30, 50], []),
        ((20, 10, 50, 30), FRAME, [10, 20, 30, 50], ["swapped"]),
        ((-5, 120, -1, 81), FRAME, [0, 100, 0, 80], ["clipped"]),
        ((100, 200, 60, 160), [[200.0, 160.0]], [50, 100, 30, 80], ["rescaled"]),
        ((10, 20, 30, 50), [[np.nan, np.nan]], [10, 20, 30, 50], []),  # taken as pixels
        ((10, 20, 30, 50), [[0.0, 0.0]], [10, 20, 30, 50], []),
    ],
)
def test_boxes_are_rescaled_ordered_and_clipped_in_this_order(box, annotated, expected, flags):
    repaired = repair(*box, annotated=annotated)
    assert repaired.boxes.tolist() == [expected]
    assert [name for name in repaired._fields[1:] if getattr(repaired, name).any()] == flags


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_corners_that_are_no_numbers_are_invalid_not_small(bad):
    repaired = repair(10, bad, 30, 50)
    assert repaired.invalid.tolist() == [True]
    assert not repaired.small.any()


@given(st.tuples(corner, corner, corner, corner))
def test_repaired_boxes_are_ordered_inside_and_stable(box):
    repaired = repair(*box)
    xmin, xmax, ymin, ymax = repaired.boxes[0]
    assert 0 <= xmin <= xmax <= 100
    assert 0 <= ymin <= ymax <= 80
    assert repaired.small[0] == ((xmax - xmin) * (ymax - ymin) < 16)
    again = repair(*repaired.boxes[0])
    assert again.boxes.tolist() == repaired.boxes.tolist()
    assert not (again.swapped | again.clipped).any()
