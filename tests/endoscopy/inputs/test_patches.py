"""Patches are cut where they should be, split by case, and told apart only if they differ."""

import numpy as np
import pytest
from PIL import Image

from core_gates.errors import GatesError
from endoscopy.inference.patch_features import patch_features, position_features
from endoscopy.inference.patches import case_of_name, cut_patches, patch_study
from endoscopy.inputs.boxes_csv import CsvLocations


def planted(folder, cases, *, bump, seed=0):
    """Two frames a case, each with one box in a noisy wall, where there is a bump or nothing."""
    generator = np.random.default_rng(seed)
    (folder / "frames").mkdir()
    lines = ["frame,xmin,xmax,ymin,ymax,width,height"]
    y, x = np.mgrid[0:70, 0:90]
    for case in range(cases):
        for view in range(2):
            left, top, side = generator.uniform(0, 66), generator.uniform(0, 46), 24.0
            radius = np.hypot(x - left - side / 2, y - top - side / 2)
            wall = (
                120 + generator.normal(0, 12, (70, 90)) + bump * 50 * np.exp(-((radius / 8) ** 2))
            )
            image = wall[..., None] * np.array([1.2, 0.8, 0.7])
            name = f"{case}_{view}"
            pixels = image.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "frames" / f"{name}.png")
            lines.append(f"{name},{left},{left + side},{top},{top + side},90,70")
    (folder / "boxes.csv").write_text("\n".join(lines))
    return folder / "frames", CsvLocations(folder / "boxes.csv")


def study(folder, cases=30, **options):
    return patch_study(*planted(folder, cases, **options), resamples=300)


def test_a_bump_is_told_from_the_wall(tmp_path):
    found = study(tmp_path, bump=1.0)
    auroc = found.scores["features"]["auroc"]
    assert auroc.value > 0.9
    assert auroc.low < auroc.value < auroc.high or auroc.value == 1
    assert auroc.units == 30
    [row] = [row for row in found.rows() if row["model"] == "features"]
    assert row["auroc"] == auroc.value
    assert row["accuracy_low"] == found.scores["features"]["accuracy"].low


def test_nothing_is_told_from_nothing(tmp_path):
    found = study(tmp_path, cases=60, bump=0.0)
    auroc = found.scores["features"]["auroc"]
    assert auroc.low < 0.5 < auroc.high
    assert found.scores["constant"]["auroc"].value == pytest.approx(0.5, abs=0.1)


def test_no_case_is_on_both_sides_of_a_split(tmp_path):
    patches = study(tmp_path, bump=1.0).patches
    assert (patches.groupby("case")["fold"].nunique() == 1).all()
    assert patches["fold"].nunique() == 5
    assert (patches.groupby("case").size() == 4).all()


def test_mucosa_patches_are_as_large_as_the_others_and_touch_no_box(tmp_path):
    source, locations = planted(tmp_path, 20, bump=1.0)
    patches, pixels = cut_patches(source, locations, case_of=case_of_name)
    assert pixels.shape == (len(patches), 48, 48, 3)
    polyps, mucosa = patches[patches["is_polyp"]], patches[~patches["is_polyp"]]
    assert sorted(polyps["side"]) == sorted(mucosa["side"])
    boxes = {name: locations.annotation(name).lesions[0].box for name in locations.names}
    for row in mucosa.itertuples():
        xmin, xmax, ymin, ymax = boxes[row.frame_id]
        apart_x = row.xmin >= xmax or row.xmin + row.side <= xmin
        apart_y = row.ymin >= ymax or row.ymin + row.side <= ymin
        assert apart_x or apart_y
        assert 0 <= row.xmin <= 90 - row.side
        assert 0 <= row.ymin <= 70 - row.side


def test_the_seed_decides_where_mucosa_is_cut(tmp_path):
    source, locations = planted(tmp_path, 3, bump=1.0)
    places = [
        cut_patches(source, CsvLocations(locations.path), case_of=case_of_name, seed=seed)[0]
        for seed in (1, 1, 2)
    ]
    assert places[0].equals(places[1])
    assert not places[0].equals(places[2])


def test_features_see_a_bump_and_not_the_place():
    y, x = np.mgrid[0:48, 0:48]
    radius = np.hypot(x - 23.5, y - 23.5)
    flat = np.full((48, 48, 3), 120.0)
    bump = flat + 80 * np.exp(-((radius / 10) ** 2))[..., None]
    found = patch_features(np.stack([flat, bump, flat]).astype(np.uint8))
    assert np.isfinite(found).all()
    assert (found[0] == found[2]).all()
    rings = found[1, 15:27]
    assert (np.diff(rings[:6]) <= 1e-9).all()  # luminance falls outwards
    assert rings[6:10].max() <= 0  # so its gradient points inwards


def test_positions_hold_no_pixel(tmp_path):
    source, locations = planted(tmp_path, 3, bump=1.0)
    patches, _ = cut_patches(source, locations, case_of=case_of_name)
    assert position_features(patches).shape == (len(patches), 5)
    assert position_features(patches).max() <= 1


def test_too_few_cases_are_refused(tmp_path):
    with pytest.raises(GatesError, match="3 cases cannot be split into 5 parts"):
        study(tmp_path, cases=3, bump=1.0)


def test_real_polyps_are_told_from_mucosa(real_frames):
    boxes = CsvLocations(real_frames / "gastric_polyp_256_boxes.csv")
    found = patch_study(real_frames / "gastric_polyp_256.zip", boxes)
    features, position = found.scores["features"]["auroc"], found.scores["position alone"]["auroc"]
    assert found.patches["is_polyp"].sum() == 438
    assert found.patches["case"].nunique() == features.units == 404
    assert features.low > 0.92
    assert features.low > position.high
    assert boxes.report.total("excluded") == 0
