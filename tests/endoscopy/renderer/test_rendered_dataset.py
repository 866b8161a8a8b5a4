import csv
import hashlib
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from endoscopy.renderer import RendererConfig, render_dataset
from endoscopy.renderer import rendered_dataset as module
from endoscopy.renderer.render import render_object
from endoscopy.renderer.rendered_dataset import video_name

CONFIG = RendererConfig(seed=9, side=40, frames=2)
OBJECTS = 3


def write(root, config=CONFIG, count=OBJECTS):
    return list(render_dataset(root, config, count))


def digest(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("rendered") / "set"
    assert write(root) == [1, 2, 3]
    return root


def test_the_layout_is_that_of_real_colon(written):
    with (written / "lesion_info.csv").open() as stream:
        lesions = list(csv.DictReader(stream))
    with (written / "video_info.csv").open() as stream:
        videos = list(csv.DictReader(stream))
    assert [row["unique_video_name"] for row in videos] == ["001-001", "001-002", "001-003"]
    assert {row["num_frames"] for row in videos} == {"2"}
    assert {row["endoscope_brand"] for row in videos} == {"A"}
    for index, row in enumerate(lesions):
        scene = render_object(CONFIG, index).scene
        assert row["unique_object_id"] == f"001-{index + 1:03d}_1"
        assert float(row["size [mm]"]) == pytest.approx(scene.size, abs=1e-4)
        assert float(row["gt_minor"]) == pytest.approx(scene.size_minor, abs=1e-4)
        assert row["exposure"] == "fixed"


def test_frames_masks_depths_and_boxes_agree_with_memory(written):
    item = render_object(CONFIG, 1)
    for t in range(2):
        stem = f"001-002_{t}"
        image = Image.open(written / "001-002_frames" / f"{stem}.jpg")
        assert image.size == (40, 40)
        assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # 4:4:4
        pixels = np.asarray(image).astype(int)
        assert np.abs(pixels - item.images[t].permute(1, 2, 0).numpy()).mean() < 4
        mask = np.asarray(Image.open(written / "001-002_masks" / f"{stem}.png"))
        np.testing.assert_array_equal(mask, item.masks[t].numpy() * 255)
        depth = np.asarray(Image.open(written / "001-002_depths" / f"{stem}.png"))
        assert depth.dtype == np.uint16
        np.testing.assert_allclose(depth / 256, item.depths[t].numpy(), atol=1 / 500)
        root = ElementTree.parse(written / "001-002_annotations" / f"{stem}.xml").getroot()
        assert root.findtext("size/width") == root.findtext("size/height") == "40"
        assert root.findtext("object/name") == "lesion"
        assert root.findtext("object/unique_id") == "001-002_1"
        box = [
            float(root.findtext(f"object/bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax")
        ]
        assert box == item.boxes[t].tolist()


def test_poses_are_written(written):
    item = render_object(CONFIG, 2)
    with (written / "001-003_cameras.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["frame"]) for row in rows] == [0, 1]
    for row, position, axes in zip(rows, item.track.position, item.track.axes, strict=True):
        assert [float(row[f"{k}_mm"]) for k in "xyz"] == pytest.approx(position.tolist(), rel=1e-4)
        forward = [float(row[f"forward_{k}"]) for k in "xyz"]
        assert forward == pytest.approx(axes[:, 2].tolist(), rel=1e-4, abs=1e-5)


def test_the_manifest_says_that_it_is_synthetic(written):
    manifest = json.loads((written / "manifest.json").read_text())
    facts = {"scope": "synthetic", "complete": True, "num_objects": OBJECTS}
    assert facts.items() <= manifest.items()
    assert manifest["config"]["seed"] == 9
    places = [video_name(index) for index in (0, 998, 999, 2500)]
    assert places == ["001-001", "001-999", "002-001", "003-503"]


def test_the_same_settings_give_the_same_bytes(written, tmp_path):
    write(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(written)
    assert write(written) == [1, 2, 3]  # nothing to do


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(1, 60, 7))
def test_a_killed_run_goes_on_to_the_same_bytes(written, tmp_path, monkeypatch, call):
    root, seen = tmp_path / "set", 0
    rename, save = module.Path.rename, Image.Image.save

    def counted(function):
        def run(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == call:
                raise Killed
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "rename", counted(rename))
        patch.setattr(Image.Image, "save", counted(save))
        try:
            write(root)
            killed = False
        except Killed:
            killed = True
    assert killed == (seen >= call)
    for path in sorted(root.glob("*_cameras.csv")):  # what counts as written is complete
        video = path.name.removesuffix("_cameras.csv")
        assert all(len(list((root / f"{video}_{name}").iterdir())) == 2 for name in module.FOLDERS)
    assert (write(root)[-1], digest(root)) == (OBJECTS, digest(written))


def test_other_settings_and_foreign_folders_are_refused(written, tmp_path, refused):
    refused(
        "holds data rendered with other settings",
        write,
        written,
        RendererConfig(seed=10, side=40, frames=2),
    )
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    refused("holds other files, expected an empty folder", write, tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    refused(r"manifest\.json is no JSON", write, tmp_path)
    refused("num_objects must be at least 1", write, tmp_path / "none", count=0, error=ValueError)


def test_without_depth_there_is_no_depth_folder(tmp_path):
    write(tmp_path / "set", RendererConfig(seed=9, side=24, frames=1, depth="none"), 1)
    assert not (tmp_path / "set" / "001-001_depths").exists()
    assert (tmp_path / "set" / "001-001_masks").exists()
