import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core_gates.errors import GatesError
from endoscopy.data.frame_table import repair_boxes
from endoscopy.data.image_reading import probe, read_mask, read_rgb
from endoscopy.data.readers.real_colon import VocAnnotation, VocObject, read_voc, write_voc

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
    assert annotation.objects[0].box == (1, 20, 3, 40)
    assert annotation.objects[0].unique_id == ""
    assert (annotation.width, annotation.height) == (8, 9)


def test_what_is_no_number_is_nan(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<annotation><object><bndbox><xmin>left</xmin></bndbox></object></annotation>")
    annotation = read_voc(path)
    assert all(map(math.isnan, annotation.objects[0].box))
    assert math.isnan(annotation.width)


@given(number, number, objects, word)
def test_round_trip(tmp_path_factory, width, height, found, database):
    path = tmp_path_factory.mktemp("voc") / "a.xml"
    annotation = VocAnnotation(width, height, tuple(found), "frame & <1>.jpg", database)
    write_voc(path, annotation)
    assert read_voc(path) == annotation
    assert [p.name for p in path.parent.iterdir()] == ["a.xml"]


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
def test_hostile_files_are_refused_in_one_line(fault, tmp_path):
    content, words = HOSTILE[fault]
    path = tmp_path / "a.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GatesError, match=words) as caught:
        read_voc(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(GatesError, match=r"nowhere\.xml cannot be read"):
        read_voc(tmp_path / "nowhere.xml")


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
        repaired = repair_boxes(boxes, size, size)
        assert not any(flags.any() for flags in repaired[1:])
        write_voc(tmp_path / path.name, annotation)
        assert read_voc(tmp_path / path.name) == annotation
        assert read_rgb(path.with_suffix(".jpg")).shape == (header.height, header.width, 3)


def test_real_masks_survive_a_round_trip(shared, tmp_path):
    """The 5 Kvasir-SEG masks are JPEG; their box is the one published with them."""
    import csv

    table = shared / "real_frames/kvasir_seg_boxes.csv"
    with table.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 5
    for row in rows:
        name = row["file"].rpartition("/")[2]
        mask = read_mask(shared / "real_frames/kvasir_seg/masks" / name)
        ys, xs = np.nonzero(mask)
        box = [xs.min(), ys.min(), xs.max(), ys.max()]
        given_box = [int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax")]
        assert np.abs(np.subtract(box, given_box)).max() <= 2
        Image.fromarray(mask * 255).save(tmp_path / "mask.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)
