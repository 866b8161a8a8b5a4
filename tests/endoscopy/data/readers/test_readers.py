import numpy as np
import pytest

from endoscopy.data.readers.real_colon import read_real_colon
from endoscopy.data.readers.sun import read_sun


def test_real_colon_in_numerical_order_with_several_lesions(real_colon, tmp_path):
    root = real_colon.official(tmp_path / "colon")
    table, report = read_real_colon(root)
    frames = table.frames
    assert table.unique_ids == tuple(real_colon.LESIONS)
    for name in real_colon.LESIONS:
        mine = frames[frames["unique_id"] == name]
        assert mine["frame_id"].tolist() == list(range(1, 12))  # 0 is a negative frame
        expected = [real_colon.box(name, frame) for frame in range(1, 12)]
        boxes = mine[["bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax"]].to_numpy()
        assert boxes.tolist() == [list(box) for box in expected]
    assert table.objects["gt"].tolist() == [6.0, 2.5, 12.0, 4.0]
    assert table.objects["brand"].tolist() == ["Olympus", "Olympus", "Fuji", "Olympus"]
    assert table.objects["patient"].tolist() == ["001-001", "001-001", "001-002", "002-001"]
    assert table.objects["histology"].tolist() == ["AD", "HP", "SSL", "AD"]
    assert set(frames["database"]) == {"REALC"}
    assert set(zip(frames["width"], frames["height"], strict=True)) == {(64, 48)}
    assert frames["frame_path"][0] == "$REAL_COLON_PATH/001-001_frames/001-001_1.jpg"
    assert table.path(0).exists()
    assert "mask_path" not in frames or not frames["mask_path"].any()
    assert report.found == len(table) == 44
    assert report.findings == {}


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
    assert report.found == len(table) == 44
    assert report.findings == {}


def test_sun_renamed_pairs_frames_in_the_order_of_their_names(sun, tmp_path):
    original, _ = read_sun(sun.official(tmp_path / "a"))
    renamed, _ = read_sun(sun.official(tmp_path / "b", renamed=True))
    columns = ["unique_id", "frame_id", "bbox_xmin", "gt"]
    assert renamed.frames[columns].equals(original.frames[columns])
    assert renamed.frames["frame_path"][9] == "$SUN_DATA_PATH/renamed/case1/image_009.jpg"
    from endoscopy.data.image_reading import read_rgb

    for row in range(len(renamed)):
        np.testing.assert_array_equal(read_rgb(renamed.path(row)), read_rgb(original.path(row)))


def test_sun_sizes_may_come_from_a_file(sun, tmp_path):
    root = sun.official(tmp_path / "sun", cases=(1, 2))
    (tmp_path / "sizes.csv").write_text("case,size_raw\n1,9mm\n2,11mm-\n")
    table, _ = read_sun(root, tmp_path / "sizes.csv")
    assert table.objects["gt"].tolist() == [9, 11]
    assert table.objects["censored"].tolist() == [False, True]


def test_published_facts_of_sun():
    import pandas as pd

    from endoscopy.data.frame_table import parse_size
    from endoscopy.data.readers import sun as module
    from endoscopy.metrics.classification import TRUTH

    objects = module._read_objects(None)
    sizes = [parse_size(text) for text in objects["gt"]]
    assert len(sizes) == 100
    assert sum(size.censored for size in sizes) == 7
    classes = TRUTH.classes([size.mm for size in sizes])
    assert np.bincount(classes).tolist() == [60, 20, 20]
    path = module.files("endoscopy.data") / "assets/sun_objects.csv"
    assert pd.read_csv(str(path))["n_frames"].sum() == 49_136


@pytest.mark.parametrize("decode", [False, True])
def test_decoding_finds_damage_in_the_middle(real_colon, tmp_path, decode):
    root = real_colon.official(tmp_path / "colon", frames=80)
    path = root / "002-001_frames/002-001_5.jpg"
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xc4")  # the table of Huffman codes
    content[start + 5 : start + 21] = b"\xff" * 16
    path.write_bytes(bytes(content))
    table, report = read_real_colon(root, decode=decode)
    assert report.unreadable == ([str(path)] if decode else [])
    assert report.found == len(table) + report.total("excluded")
