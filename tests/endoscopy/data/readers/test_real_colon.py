import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endoscopy.data.frame_table import parse_size, repair_boxes
from endoscopy.data.images import probe, read_rgb
from endoscopy.data.readers import sun as sun_reader
from endoscopy.data.readers.real_colon import (
    VocAnnotation,
    VocObject,
    read_real_colon,
    read_voc,
    write_voc,
)
from endoscopy.data.readers.sun import read_sun
from endoscopy.metrics.classification import TRUTH

number = st.floats(0, 5000, allow_nan=False).map(lambda v: round(v, 2))
word = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=12)
objects = st.lists(
    st.builds(VocObject, word, word, word, st.tuples(number, number, number, number)), max_size=4
)


def test_official_order_and_several_lesions(real_colon, tmp_path):
    boxes = {"001-001_1": (4, 18, 9, 29), "001-001_2": (24, 38, 10, 30)}
    annotation = read_voc(real_colon.write_annotation(tmp_path, "001-001", 17, boxes))
    assert (annotation.width, annotation.height) == (64, 48)
    assert (annotation.filename, annotation.database) == ("001-001_17.jpg", "cosmo")
    assert {o.unique_id: o.box for o in annotation.objects} == boxes
    assert {o.name for o in annotation.objects} == {"lesion"}


def test_tags_are_read_by_name_in_any_order(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(
        "<annotation><object><bndbox><ymax>40</ymax><xmin>1</xmin><ymin>3</ymin><xmax> 20 </xmax>"
        "</bndbox></object><size><height>9</height><width>8</width></size></annotation>"
    )
    annotation = read_voc(path)
    assert (annotation.objects[0].box, annotation.objects[0].unique_id) == ((1, 20, 3, 40), "")
    assert (annotation.width, annotation.height) == (8, 9)


def test_what_is_no_number_is_nan(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<annotation><object><bndbox><xmin>left</xmin></bndbox></object></annotation>")
    annotation = read_voc(path)
    assert all(map(math.isnan, annotation.objects[0].box))
    assert math.isnan(annotation.width)


@settings(max_examples=40)
@given(number, number, objects, word)
def test_round_trip(tmp_path_factory, width, height, found, database):
    path = tmp_path_factory.mktemp("voc") / "a.xml"
    annotation = VocAnnotation(width, height, tuple(found), "frame & <1>.jpg", database)
    write_voc(path, annotation)
    assert (read_voc(path), [p.name for p in path.parent.iterdir()]) == (annotation, ["a.xml"])


LAUGHS = "<!DOCTYPE a [<!ENTITY x 'ha'>" + "".join(
    f"<!ENTITY x{i} '{f'&x{i - 1};' * 10 if i else '&x;' * 10}'>" for i in range(9)
)
HOSTILE = {
    "billion laughs": (f"{LAUGHS}]><annotation>&x8;</annotation>", "document type"),
    "external entity": (
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation>&x;</annotation>",
        "document type",
    ),
    "hidden in utf-16": (
        "<?xml version='1.0' encoding='utf-16'?><!DOCTYPE a [<!ENTITY x 'y'>]><annotation/>".encode(
            "utf-16"
        ),
        "document type",
    ),
    "deep": ("<annotation>" * 40 + "</annotation>" * 40, "nests"),
    "huge": ("<annotation>" + " " * 2**20 + "</annotation>", "bytes, expected an annotation"),
    "unknown entity": ("<annotation>&y;</annotation>", "no XML"),
    "truncated": ("<annotation><object>", "no XML"),
    "empty": ("", "no XML"),
    "binary": (bytes(range(256)), "no XML"),
    "another root": ("<html></html>", "expected a Pascal VOC"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_files_are_refused_in_one_line(fault, tmp_path, refused):
    content, words = HOSTILE[fault]
    path = tmp_path / "a.xml"
    assert str(path) in refused("cannot be read", read_voc, path)  # it is absent
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in refused(words, read_voc, path)


def test_real_annotations_survive_a_round_trip(shared, tmp_path):
    """The 24 original gastroscopy frames: sizes agree, boxes need no repair, nothing is lost."""
    paths = sorted((shared / "real_frames/gastric_polyp_original").glob("*.xml"))
    assert len(paths) == 24
    for path in paths:
        annotation = read_voc(path)
        header = probe(path.with_suffix(".jpg"))
        assert (annotation.width, annotation.height) == (header.width, header.height)
        assert len(annotation.objects) >= 1
        boxes = np.array([o.box for o in annotation.objects])
        size = np.array([[header.width, header.height]] * len(boxes), float)
        assert not any(flags.any() for flags in repair_boxes(boxes, size, size)[1:])
        write_voc(tmp_path / path.name, annotation)
        assert read_voc(tmp_path / path.name) == annotation
        assert read_rgb(path.with_suffix(".jpg")).shape == (header.height, header.width, 3)


def test_real_colon_in_numerical_order_with_several_lesions(real_colon, tmp_path):
    table, report = read_real_colon(real_colon.official(tmp_path / "colon"))
    frames = table.frames
    assert table.unique_ids == tuple(real_colon.LESIONS)
    for name in real_colon.LESIONS:
        mine = frames[frames["unique_id"] == name]
        assert mine["frame_id"].tolist() == list(range(1, 12))  # 0 is a negative frame
        expected = [real_colon.box(name, frame) for frame in range(1, 12)]
        boxes = mine[["bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax"]].to_numpy()
        assert boxes.tolist() == [list(box) for box in expected]
    facts = {
        "gt": [6.0, 2.5, 12.0, 4.0],
        "brand": ["Olympus", "Olympus", "Fuji", "Olympus"],
        "patient": ["001-001", "001-001", "001-002", "002-001"],
        "histology": ["AD", "HP", "SSL", "AD"],
    }
    assert table.objects[list(facts)].to_dict("list") == facts
    assert set(frames["database"]) == {"REALC"}
    assert set(zip(frames["width"], frames["height"], strict=True)) == {(64, 48)}
    assert frames["frame_path"][0] == "$REAL_COLON_PATH/001-001_frames/001-001_1.jpg"
    assert table.path(0).exists()
    assert "mask_path" not in frames or not frames["mask_path"].any()
    assert (report.found, len(table), report.findings) == (44, 44, {})


def test_rendered_layout_brings_masks_depths_and_columns(real_colon, tmp_path):
    root = real_colon.official(tmp_path / "colon", targets=True)
    extra = {"gt_minor": "4.5", "shape": "flat", "distance_mm": "12.25", "exposure": "agc"}
    rows = [row | extra for row in real_colon.lesion_rows()]
    real_colon.write_csv(root / "lesion_info.csv", rows)
    (root / "manifest.json").write_text('{"scope": "synthetic"}')
    table, report = read_real_colon(root)
    assert set(table.frames["database"]) == {"SYNTH"}
    assert table.frames["frame_path"][0].startswith("$SYNTHETIC_PATH/001-001_frames/")
    assert table.path(3, "mask_path").exists()
    assert table.path(3, "depth_path").name == table.path(3).with_suffix(".png").name
    first = table.objects.iloc[0]
    assert (first["gt_minor"], first["shape"], first["exposure"]) == (4.5, "flat", "agc")
    assert first["distance_mm"] == 12.25
    assert report.findings == {}


def test_small_boxes_of_rendered_frames_are_right(real_colon, tmp_path):
    """A far polyp covers a few pixels of a small frame; a box drawn by hand so small is a slip."""
    root = real_colon.official(tmp_path / "colon")
    real_colon.write_annotation(root, "002-001", 5, {"002-001_1": (10, 12, 10, 13)})
    _, report = read_real_colon(root)
    assert report.total("excluded") == 1
    (root / "manifest.json").write_text('{"scope": "synthetic"}')
    table, report = read_real_colon(root)
    assert report.findings == {}
    assert len(table) == 44


def test_sun_original_in_numerical_order(sun, tmp_path):
    table, report = read_sun(sun.official(tmp_path / "sun"))
    assert table.unique_ids == ("1", "2", "10", "24")
    assert table.objects["gt"].tolist() == [6, 18, 3, 15]
    assert table.objects["censored"].tolist() == [False, False, False, True]
    mine = table.frames[table.frames["unique_id"] == "10"]
    assert mine["frame_id"].tolist() == list(range(11))
    assert mine["bbox_xmin"].tolist() == [5.0 + frame for frame in range(11)]
    assert mine["frame_path"].tolist()[9:] == [
        f"$SUN_DATA_PATH/case10/{sun.name(10, frame)}" for frame in (9, 10)
    ]
    assert table.objects["shape"].tolist()[:2] == ["Is", "Is"]
    assert set(zip(mine["width"], mine["height"], strict=True)) == {(60, 50)}
    assert (report.found, len(table), report.findings) == (44, 44, {})


def test_sun_renamed_pairs_frames_in_the_order_of_their_names(sun, tmp_path):
    original, _ = read_sun(sun.official(tmp_path / "a"))
    renamed, _ = read_sun(sun.official(tmp_path / "b", renamed=True))
    columns = ["unique_id", "frame_id", "bbox_xmin", "gt"]
    assert renamed.frames[columns].equals(original.frames[columns])
    assert renamed.frames["frame_path"][9] == "$SUN_DATA_PATH/renamed/case1/image_009.jpg"
    for row in range(len(renamed)):
        np.testing.assert_array_equal(read_rgb(renamed.path(row)), read_rgb(original.path(row)))


def test_sun_sizes_may_come_from_a_file(sun, tmp_path):
    root = sun.official(tmp_path / "sun", cases=(1, 2))
    (tmp_path / "sizes.csv").write_text("case,size_raw\n1,9mm\n2,11mm-\n")
    table, _ = read_sun(root, tmp_path / "sizes.csv")
    assert table.objects["gt"].tolist() == [9, 11]
    assert table.objects["censored"].tolist() == [False, True]


def test_published_facts_of_sun():
    sizes = [parse_size(text) for text in sun_reader._read_objects(None)["gt"]]
    assert (len(sizes), sum(size.censored for size in sizes)) == (100, 7)
    assert np.bincount(TRUTH.classes([size.mm for size in sizes])).tolist() == [60, 20, 20]
    path = sun_reader.files("endoscopy.data") / "assets/sun_objects.csv"
    assert pd.read_csv(str(path))["n_frames"].sum() == 49_136


@pytest.mark.parametrize("decode", [False, True])
def test_decoding_finds_damage_in_the_middle(real_colon, tmp_path, damage, decode):
    root = real_colon.official(tmp_path / "colon", frames=80)
    path = root / "002-001_frames/002-001_5.jpg"
    damage(path)
    table, report = read_real_colon(root, decode=decode)
    assert report.unreadable == ([str(path)] if decode else [])
    assert report.found == len(table) + report.total("excluded")
