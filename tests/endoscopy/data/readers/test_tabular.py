"""Faulty data sets: everything is counted and reported, nothing is lost, no fault is silent."""

import shutil

import numpy as np
import pytest
from PIL import Image

from endoscopy.data.frame_table import FrameTable
from endoscopy.data.object_splits import official_hag6, read_folds
from endoscopy.data.readers.real_colon import read_real_colon
from endoscopy.data.readers.sun import read_sun
from endoscopy.data.readers.tabular import read_frame_table
from endoscopy.data.sizing_datamodule import PolypSizingDataModule

FRAMES = 40  # 4 lesions on 39 frames each: one bad file in 240 is below 1 %
ROWS = 4 * (FRAMES - 1)


@pytest.fixture
def colon(real_colon, tmp_path):
    return real_colon.official(tmp_path / "colon", frames=FRAMES)


def lesion(root, make, name, **changes):
    rows = make.lesion_rows()
    for row in rows:
        if row["unique_object_id"] == name:
            row.update(changes)
    make.write_csv(root / "lesion_info.csv", rows)


def size(value):
    return lambda root, make: lesion(root, make, "001-002_1", **{"size [mm]": value})


def boxes(**changes):
    """Rewrite the annotation of frame 5 of video 002-001 with another box."""

    def damage(root, make):
        xmin, xmax, ymin, ymax = make.box("002-001_1", 5)
        box = {"xmin": xmin, "xmax": xmax, "ymin": ymin, "ymax": ymax} | changes
        make.write_annotation(root, "002-001", 5, {"002-001_1": tuple(box.values())})

    return damage


def truncate(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def frame(root, number=5):
    return root / f"002-001_frames/002-001_{number}.jpg"


def gray16(root, make):
    pixels = (make.image("002-001", 5)[..., 0].astype(np.uint16)) * 257
    Image.fromarray(pixels).save(root / "a.png")
    (root / "a.png").rename(frame(root))


def other_size(root, make):
    make.write_image(frame(root), make.image("002-001", 5, 128, 96))


def unknown_lesion(root, make):
    make.write_annotation(root, "002-001", 5, {"002-001_9": make.box("002-001_1", 5)})


def no_id(root, make):
    make.write_annotation(root, "002-001", 5, {" nan ": make.box("002-001_1", 5)})
    rows = make.lesion_rows()
    make.write_csv(root / "lesion_info.csv", [*rows, rows[0] | {"unique_object_id": "nan"}])


def bad_xml(root, make):
    (root / "002-001_annotations/002-001_5.xml").write_text("<annotation><object>")


def entities(root, make):
    text = "<!DOCTYPE a [<!ENTITY x 'y'>]><annotation>&x;</annotation>"
    (root / "002-001_annotations/002-001_5.xml").write_text(text)


WHOLE = FRAMES - 1
REPAIRED = {
    "NaN size": (size("nan"), "size is missing", "excluded", WHOLE),
    "empty size": (size(""), "size is missing", "excluded", WHOLE),
    "size is text": (size("large"), "size cannot be read", "excluded", WHOLE),
    "size zero": (size("0"), "size is not between", "excluded", WHOLE),
    "swapped corners": (boxes(xmin=30, xmax=12), "corners of the box were swapped", "repaired", 1),
    "box leaves the frame": (boxes(xmin=-8, ymax=70), "box clipped to the frame", "repaired", 1),
    "box outside": (boxes(xmin=90, xmax=120), "less than 16 square pixels", "excluded", 1),
    "tiny box": (boxes(xmin=10, xmax=12, ymin=10, ymax=15), "less than 16", "excluded", 1),
    "box of NaN": (boxes(xmax="nan"), "a corner of the box is no number", "excluded", 1),
    "box of words": (boxes(ymin="top"), "a corner of the box is no number", "excluded", 1),
    "image of another size": (other_size, "box rescaled", "repaired", 1),
    "16-bit image": (gray16, "more than 8 bits a channel", "repaired", 1),
    "truncated JPEG": (lambda r, m: truncate(frame(r)), "image is truncated", "excluded", 1),
    "absent JPEG": (lambda r, m: frame(r).unlink(), "image does not exist", "excluded", 1),
    "empty JPEG": (lambda r, m: frame(r).write_bytes(b""), "image cannot be read", "excluded", 1),
    "lesion of no table": (unknown_lesion, "object is not in lesion_info.csv", "excluded", 1),
    "id is nan": (no_id, "object has no id", "excluded", 1),
    "damaged XML": (bad_xml, "annotation cannot be read", "excluded", 1),
    "XML with entities": (entities, "annotation cannot be read", "excluded", 1),
}


@pytest.mark.parametrize("fault", REPAIRED)
def test_faults_are_counted_and_nothing_else_changes(fault, colon, real_colon):
    damage, words, action, count = REPAIRED[fault]
    sound, _ = read_real_colon(colon)
    damage(colon, real_colon)
    table, report = read_real_colon(colon)
    found = {
        key: places
        for key, places in report.findings.items()
        if key[0] == action and words in key[1]
    }
    assert [len(places) for places in found.values()] == [count]
    assert report.total("excluded") == (count if action == "excluded" else 0)
    assert report.found == ROWS == len(table) + report.total("excluded")
    place = next(iter(found.values()))[0]
    assert ("001-002" if count > 1 else "002-001") in place or "nan" in place
    assert any(words in line for line in report.lines())

    keys = ["unique_id", "frame_id"]
    spoiled = (
        (sound.frames["unique_id"] == "001-002_1")
        if count > 1
        else ((sound.frames["unique_id"] == "002-001_1") & (sound.frames["frame_id"] == 5))
    )
    left = table.frames.merge(sound.frames[spoiled][keys], how="left", indicator=True)
    left = left[left["_merge"] == "left_only"].drop(columns="_merge").reset_index(drop=True)
    assert left[sound.frames.columns].equals(sound.frames[~spoiled].reset_index(drop=True))


def test_a_repaired_box_is_the_box_of_the_polyp(colon, real_colon):
    columns = ["bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax", "width", "height"]

    def row():
        frames = read_real_colon(colon)[0].frames
        mine = (frames["unique_id"] == "002-001_1") & (frames["frame_id"] == 5)
        return frames.loc[mine, columns].to_numpy()[0].tolist()

    xmin, xmax, ymin, ymax = real_colon.box("002-001_1", 5)
    boxes(xmin=xmax, xmax=xmin)(colon, real_colon)
    assert row() == [xmin, xmax, ymin, ymax, 64, 48]
    boxes(xmin=-8, ymax=70)(colon, real_colon)
    assert row() == [0, xmax, ymin, 48, 64, 48]
    boxes()(colon, real_colon)
    other_size(colon, real_colon)
    assert row() == [2 * xmin, 2 * xmax, 2 * ymin, 2 * ymax, 128, 96]


def test_a_size_with_a_dash_is_a_lower_bound(colon, real_colon):
    size("15mm-")(colon, real_colon)
    table, report = read_real_colon(colon)
    mine = (table.frames["unique_id"] == "001-002_1").to_numpy()
    assert set(table.frames["gt"][mine]) == {15.0}
    np.testing.assert_array_equal(table.censored, mine)
    assert report.findings == {}


def test_an_object_with_one_frame_is_kept(colon, real_colon):
    for number in range(FRAMES):
        if number != 7:
            real_colon.write_annotation(colon, "001-002", number, {})
    table, report = read_real_colon(colon)
    assert (table.frames["unique_id"] == "001-002_1").sum() == 1
    assert report.findings == {}


def test_an_object_without_frames_is_noted(colon, real_colon):
    rows = real_colon.lesion_rows()
    extra = rows[0] | {"unique_object_id": "009-001_1"}
    real_colon.write_csv(colon / "lesion_info.csv", [*rows, extra])
    _, report = read_real_colon(colon)
    assert report.findings == {("noted", "object has no frame"): ["009-001_1"]}


def many_truncated(root, make):
    for number in range(1, 9):
        truncate(frame(root, number))


def many_bad_xml(root, make):
    for number in range(1, 9):
        (root / f"002-001_annotations/002-001_{number}.xml").write_text("<x")


def duplicate(root, make):
    path = make.write_annotation(root, "002-001", 5, {"002-001_1": make.box("002-001_1", 5)})
    text = path.read_text()
    item = text[text.index("\t<object>") : text.index("</annotation>")]
    path.write_text(text.replace("</annotation>", item + "</annotation>"))


def listed_twice(root, make):
    rows = make.lesion_rows()
    make.write_csv(root / "lesion_info.csv", [*rows, rows[2]])


def no_size_column(root, make):
    rows = [{k: v for k, v in row.items() if k != "size [mm]"} for row in make.lesion_rows()]
    make.write_csv(root / "lesion_info.csv", rows)


FATAL = {
    "more than 1 % of the frames": (many_truncated, "8 of .* cannot be read, more than 1 %"),
    "more than 1 % of the annotations": (many_bad_xml, "8 of .* cannot be read, more than 1 %"),
    "object twice on a frame": (duplicate, "object 002-001_1 has two rows of frame 5"),
    "object twice in the table": (listed_twice, "lists object 001-002_1 twice"),
    "no column of sizes": (no_size_column, r"lacks size \[mm\]"),
    "no table of lesions": (
        lambda r, m: (r / "lesion_info.csv").unlink(),
        "holds no lesion_info.csv, expected the layout of REAL-Colon",
    ),
    "no annotations": (
        lambda r, m: [shutil.rmtree(p) for p in r.glob("*_annotations")],
        "holds no folder",
    ),
    "no size at all": (
        lambda r, m: m.write_csv(
            r / "lesion_info.csv", [row | {"size [mm]": ""} for row in m.lesion_rows()]
        ),
        "none of 156 rows can be used: size is missing",
    ),
    "bad manifest": (lambda r, m: (r / "manifest.json").write_text("{"), "is no JSON object"),
}


@pytest.mark.parametrize("fault", FATAL)
def test_fatal_faults_are_one_line(fault, colon, real_colon, refused):
    damage, words = FATAL[fault]
    damage(colon, real_colon)
    assert str(colon) in refused(words, read_real_colon, colon)


def annotation(root, case):
    return root / f"annotation_txt/case{case}.txt"


def edit(case, change):
    def damage(root):
        path = annotation(root, case)
        path.write_text("\n".join(change(path.read_text().splitlines())))

    return damage


SUN_FAULTS = {
    "line without a box": (
        edit(1, lambda lines: [lines[0].split()[0], *lines[1:]]),
        "line of the annotation cannot be read",
    ),
    "box of words": (
        edit(1, lambda lines: [lines[0].replace("6,", "six,"), *lines[1:]]),
        "line of the annotation cannot be read",
    ),
    "another class": (
        edit(1, lambda lines: [lines[0][:-1] + "1", *lines[1:]]),
        "box is of another class",
    ),
    "swapped": (
        edit(1, lambda lines: [lines[0].split()[0] + " 40,6,10,30,0", *lines[1:]]),
        "corners of the box were swapped",
    ),
}


@pytest.mark.parametrize("fault", SUN_FAULTS)
def test_faults_of_sun_are_counted(fault, sun, tmp_path):
    damage, words = SUN_FAULTS[fault]
    root = sun.official(tmp_path / "sun")
    damage(root)
    table, report = read_sun(root)
    assert [len(places) for (_, reason), places in report.findings.items() if words in reason] == [
        1
    ]
    assert report.found == 44 == len(table) + report.total("excluded")


def test_a_case_of_unknown_size_is_counted(sun, tmp_path):
    table, report = read_sun(sun.official(tmp_path / "sun", cases=(1, 777)))
    assert report.count("case is not in the table of sizes") == 11
    assert report.found == 22 == len(table) + 11


SUN_FATAL = {
    "frame annotated twice": (edit(1, lambda lines: [*lines, lines[3]]), "object 1 has two rows"),
    "frames absent": (lambda root: shutil.rmtree(root / "case1"), "neither case1 nor renamed"),
    "no annotations": (lambda root: shutil.rmtree(root / "annotation_txt"), "expected the layout"),
    "bytes of Latin-1": (
        lambda root: annotation(root, 1).write_bytes(
            annotation(root, 1).read_bytes()[:1] + b"\xe9" + annotation(root, 1).read_bytes()[1:]
        ),
        "case1.txt, line 1: byte 2 is not UTF-8",
    ),
}


@pytest.mark.fault("46 S1")
@pytest.mark.parametrize("fault", SUN_FATAL)
def test_fatal_faults_of_sun(fault, sun, tmp_path, refused):
    damage, words = SUN_FATAL[fault]
    root = sun.official(tmp_path / "sun")
    damage(root)
    refused(words, read_sun, root)


def test_renamed_frames_that_cannot_be_paired_are_refused(sun, tmp_path, refused):
    root = sun.official(tmp_path / "sun", renamed=True)
    (root / "renamed/case2/image_003.jpg").unlink()
    refused("holds 10 frames and its annotation 11", read_sun, root)


def write(table, path, **changes):
    table.frames.assign(**changes).to_csv(path, index=False)
    return path


def test_ids_that_went_through_floating_point_come_back(make_table, tmp_path):
    table = make_table({"7": 3, "12": 8})
    names = table.frames["unique_id"].map({"7": " 7.0", "12": "12.0 "})
    read, _ = read_frame_table(
        write(table, tmp_path / "a.csv", unique_id=names), check_images=False
    )
    assert read.unique_ids == ("7", "12")


TABLE_FATAL = {
    "two sizes": ({"gt": [3, 3, 4, 8, 8, 8]}, "object a has two sizes, 3.0 and 4.0"),
    "two data sets": (
        {"database": ["SUN", "SUN", "REALC", "SUN", "SUN", "SUN"]},
        "object a has two data sets, SUN and REALC",
    ),
    "two patients": ({"patient": [*"ppqqqq"]}, "object a has two patients, p and q"),
    "duplicate": ({"frame_id": [0, 1, 1, 0, 1, 2]}, "object a has two rows of frame 1"),
}


@pytest.mark.parametrize("fault", TABLE_FATAL)
def test_contradictions_in_a_table_are_refused(fault, make_table, tmp_path, refused):
    changes, words = TABLE_FATAL[fault]
    path = write(make_table({"a": 3, "b": 8}), tmp_path / "a.csv", **changes)
    refused(words, read_frame_table, path, check_images=False)


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (",gt", ",gt,gt", "line 1: it has two columns named 'gt'"),
        ("\n", "\n5,5,", "line 2: it has .* cells, expected"),
    ],
)
def test_cells_of_a_table_that_would_be_lost_are_refused(
    old, new, words, make_table, tmp_path, refused
):
    path = write(make_table({"a": 3}), tmp_path / "a.csv")
    path.write_text(path.read_text().replace(old, new, 1))
    refused(words, read_frame_table, path, check_images=False)


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize("word", ["NA", "nan", "None", " - "])
def test_missing_patients_are_not_one_patient(word, make_table, tmp_path):
    names = [word, word, word, "p", "p", "p"]
    path = write(make_table({"a": 3, "b": 8}), tmp_path / "a.csv", patient=names)
    read, _ = read_frame_table(path, check_images=False)
    assert list(read.frames["patient"]) == ["", "", "", "p", "p", "p"]


def test_tables_are_joined_by_keys_not_by_the_order_of_rows(make_table, tmp_path):
    """The split file lists the same rows in another order; row masks would leak silently."""
    names = [f"00{k}-001_1" for k in range(9)]
    table = make_table(dict.fromkeys(names, 4.0), frames=4)
    folds = {name: k % 3 for k, name in enumerate(names)}
    shuffled = table.frames.sample(frac=1, random_state=0)
    assert shuffled["unique_id"].tolist() != table.frames["unique_id"].tolist()
    shuffled.assign(kfold_id=shuffled["unique_id"].map(folds)).to_csv(tmp_path / "f.csv")
    split = read_folds(tmp_path / "f.csv").split(table, 1)
    for part, fold in ((split.test, 1), (split.validation, 2), (split.train, 0)):
        assert set(table.frames["unique_id"][part]) == {n for n in names if folds[n] == fold}
        assert len(part) == 12
    again = FrameTable(shuffled.reset_index(drop=True))
    other = read_folds(tmp_path / "f.csv").split(again, 1)
    assert set(again.frames["frame_path"][other.test]) == set(
        table.frames["frame_path"][split.test]
    )


@pytest.mark.parametrize("reader", [official_hag6, read_folds])
def test_an_object_in_two_folds_is_refused(reader, tmp_path, refused):
    path = tmp_path / "f.csv"
    path.write_text("unique_id,gt_group,kfold_id\na,Dim,0\nb,Dim,1\na,Dim,1\n")
    refused("object a is in two folds", reader, path)


@pytest.mark.fault("endoscopy D21")
def test_sizes_without_a_unit_that_are_centimeters_are_refused(make_table, tmp_path, refused):
    """As millimeters every polyp would be diminutive, silently."""
    sizes = {"a": 0.3, "b": 0.5, "c": 0.6, "d": 1.2, "e": 2.0, "f": 3.5}
    table = make_table(sizes)
    refused(
        r"6 objects lie between 0.3 and 3.5, .* centimeters",
        read_frame_table,
        write(table, tmp_path / "a.csv"),
        check_images=False,
    )
    texts = table.frames["gt"].map("{} cm".format)
    found, _ = read_frame_table(write(table, tmp_path / "b.csv", gt=texts), check_images=False)
    assert found.objects["gt"].tolist() == [3, 5, 6, 12, 20, 35]
    small = table.frames["gt"].map("{} mm".format)
    found, _ = read_frame_table(write(table, tmp_path / "c.csv", gt=small), check_images=False)
    assert found.objects["gt"].tolist() == list(sizes.values())


@pytest.mark.fault("endoscopy D18")
def test_what_was_left_out_is_said_before_counts_are_refused(make_table, tmp_path, refused):
    table = make_table(dict.fromkeys("abcdefgh", 4.0), frames=1, database="REALC")
    tiny = table.frames["bbox_xmax"].where(table.frames["unique_id"] > "c", 10.5)
    path = write(table, tmp_path / "a.parquet.csv", bbox_xmax=tiny, frame_path="x.jpg")
    Image.new("RGB", (64, 48)).save(tmp_path / "x.jpg")
    data = PolypSizingDataModule(
        table=str(path), split="counts", train_objects=4, validation_objects=1, test_objects=2
    )
    message = refused("^5 objects cannot give 4 for training", data.load)
    assert "3 of 8 rows were left out: 3: less than 16 square pixels" in message


@pytest.mark.fault("endoscopy D19")
def test_a_missing_real_colon_names_the_option_and_the_download(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    for folder in ("absent", "empty"):
        message = refused(folder, PolypSizingDataModule(real_colon=str(tmp_path / folder)).load)
        assert "--data.real_colon FOLDER" in message
        assert "gates endoscopy prepare --config real_colon --download FOLDER" in message
