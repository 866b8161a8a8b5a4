"""The same numbers whatever contains the frames, on planted and on real ones."""

import dataclasses
import os

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from endoscopy.bundles.frame_quality import fit_quality
from endoscopy.bundles.sizing_bundle import Scope, SizingBundle, load_bundle
from endoscopy.evaluation.conformal import SplitConformal
from endoscopy.explain.strips import tracks_of
from endoscopy.inputs.locations import CsvLocations, MaskLocations
from endoscopy.metrics.classification import CutOffs
from endoscopy.models.sizer import tiny_resnet
from endoscopy.prediction import objects_of, predict
from endoscopy.segmenter import AutomaticLocations, Segmenter
from endoscopy.training.targets import Classes, LogSize, Ordinal, ScaledMillimeters

NUMBERS = ["predicted_mm", "sharpness", "bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax"]


def small_bundle(streams=("rgb_mask", "crop"), target=None, **changes):
    target = target or LogSize()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_resnet(streams, outputs=target.outputs, geometry=True).eval()
    return SizingBundle(model, target, 64, **changes)


@pytest.fixture
def bundle():
    return small_bundle()


@pytest.fixture
def boxes(tmp_path, pictures):
    lines = ["file,xmin,ymin,xmax,ymax,width,height"]
    for number, image in enumerate(pictures):
        height, width = image.shape[:2]
        lines.append(f"frame_{number}.png,{5 + number},4,{30 + number},25,{width},{height}")
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    return tmp_path / "boxes.csv"


@pytest.fixture
def sources(tmp_path, pictures, write):
    images = write.padded(pictures)
    video = write.video(tmp_path / "video.mp4", images)
    return {
        "folder": write.images(tmp_path / "folder", pictures),
        "video": video,
        "dicom": write.dicom(tmp_path / "image.dcm", images),
        "dicom video": write.dicom(tmp_path / "video.dcm", images, video=video),
    }


def assert_same_numbers(found, expected):
    pd.testing.assert_frame_equal(found.frames[NUMBERS], expected.frames[NUMBERS], check_exact=True)


def test_all_containers_give_exactly_the_same(sources, boxes, bundle):
    expected = predict(sources["folder"], CsvLocations(boxes), bundle)
    assert expected.frames["predicted_mm"].nunique() == 3
    for source in list(sources.values())[1:]:
        assert_same_numbers(predict(source, CsvLocations(boxes), bundle), expected)


def test_small_boxes_count_on_rendered_frames_and_are_named_on_others(
    sources, tmp_path, bundle, refused
):
    small = tmp_path / "small.csv"
    rows = ["frame_0,5,8,4,7", "frame_1,5,8,4,7", "frame_2,5,5.5,4,5"]
    small.write_text("\n".join(["frame,xmin,xmax,ymin,ymax", *rows]))
    refused(
        "left out 3: box below 16 square pixels",
        predict,
        sources["folder"],
        CsvLocations(small),
        bundle,
    )
    (sources["folder"] / "manifest.json").write_text('{"scope": "synthetic"}')
    locator = CsvLocations(small)
    found = predict(sources["folder"], locator, bundle)
    assert found.frames["frame_id"].tolist() == ["frame_0", "frame_1"]
    assert locator.report.count("box below 1 square pixels") == 1


def test_batches_do_not_change_the_rows(sources, boxes, bundle):
    whole = predict(sources["folder"], CsvLocations(boxes), bundle)
    single = predict(sources["folder"], CsvLocations(boxes), bundle, batch_size=1)
    np.testing.assert_allclose(
        whole.frames["predicted_mm"], single.frames["predicted_mm"], rtol=1e-5
    )
    assert whole.frames["frame_id"].tolist() == ["frame_0", "frame_1", "frame_2"]


def test_a_clip_shows_one_lesion_and_a_folder_many(sources, boxes, bundle):
    for source, expected in (("folder", 3), ("video", 1), ("dicom", 1)):
        prediction = predict(sources[source], CsvLocations(boxes), bundle)
        assert len(objects_of(prediction, bundle)) == expected
    one = predict(sources["folder"], CsvLocations(boxes), bundle, objects="source")
    table = objects_of(one, bundle)
    assert table["num_frames"].tolist() == [3]
    assert table["predicted_mm"][0] == one.frames["predicted_mm"].median()


def residuals(width):
    return SplitConformal(tuple(np.linspace(-width, width, 99)))


WARD = Scope(calibrated_for=("ward",))


@pytest.mark.fault("endoscopy A3")
def test_objects_have_the_interval_of_the_way_in_which_they_are_located(
    tmp_path, sources, boxes, write
):
    bundle = small_bundle(
        intervals={"boxes": residuals(0.3), "automatic": residuals(0.6)}, scope=WARD
    )
    found = predict(sources["video"], CsvLocations(boxes), bundle, scope="ward")
    table = objects_of(found, bundle)
    ratio = table["upper_mm"] / table["predicted_mm"]
    np.testing.assert_allclose(np.log(ratio), bundle.intervals["boxes"].half_width)
    np.testing.assert_allclose(table["predicted_mm"] / table["lower_mm"], ratio)
    segmenter = Segmenter(48)
    nn.init.constant_(segmenter.head.bias, 0.0)
    automatic = AutomaticLocations(segmenter)
    table = objects_of(predict(sources["video"], automatic, bundle, scope="ward"), bundle)
    width = np.log(table["upper_mm"] / table["predicted_mm"])
    np.testing.assert_allclose(width, bundle.intervals["automatic"].half_width)
    mask = np.zeros((47, 60), dtype=np.uint8)
    mask[4:25, 5:30] = 255
    masks = MaskLocations(write.images(tmp_path / "masks", [mask] * 3, "012"))
    table = objects_of(predict(sources["video"], masks, bundle, scope="ward"), bundle)
    assert table[["lower_mm", "upper_mm"]].isna().to_numpy().all()
    assert "p_large" not in table


@pytest.mark.fault("endoscopy A3")
def test_no_interval_is_given_out_of_scope_or_for_an_object_that_abstains(sources, boxes):
    bundle = small_bundle(intervals={"boxes": residuals(0.3)}, scope=WARD)
    for scope in (None, "elsewhere"):
        found = predict(sources["video"], CsvLocations(boxes), bundle, scope=scope)
        table = objects_of(found, bundle)
        assert table[["lower_mm", "upper_mm"]].isna().to_numpy().all()
        shown = bundle.scope.express(table, scope)
        for name in ("lower_mm", "lower_index", "size_class", "interval_crosses", "p_large"):
            assert name not in shown
    found = predict(sources["folder"], CsvLocations(boxes), bundle, scope="ward")
    found.frames.loc[1, "reasons"] = "out of distribution"
    table = objects_of(found, bundle)
    assert table["lower_mm"].isna().tolist() == [False, True, False]
    assert table["interval_crosses"][1] == ""


@pytest.mark.fault("endoscopy C14")
def test_objects_have_classes_chances_and_the_cut_offs_that_their_interval_crosses(sources, boxes):
    bundle = small_bundle(intervals={"boxes": residuals(0.3)}, scope=WARD)
    found = predict(sources["folder"], CsvLocations(boxes), bundle, scope="ward")
    found.frames["predicted_mm"] = [3.0, 9.0, 5.2]
    table = objects_of(found, bundle)
    assert table["size_class"].tolist() == ["diminutive", "small", "small"]
    assert table["interval_crosses"].tolist() == ["", "10 mm", "5 mm"]
    chances = table[["p_diminutive", "p_small", "p_large"]]
    expected = bundle.intervals["boxes"].probabilities(np.array([3.0, 9.0, 5.2]))
    np.testing.assert_allclose(chances, expected)
    wide = small_bundle(intervals={"boxes": residuals(1.0)}, scope=WARD)
    both = "5 and 10 mm"
    assert objects_of(found, wide)["interval_crosses"].tolist() == ["5 mm", both, both]
    whole = small_bundle(scope=WARD, cut_offs=CutOffs(5.5, 9.5))
    assert objects_of(found, whole)["size_class"].tolist() == ["diminutive", "small", "diminutive"]


def test_masks_matter_to_a_network_of_masks_only(tmp_path, sources, pictures, write):
    drawn = [np.zeros(image.shape[:2], dtype=np.uint8) for image in pictures]
    for number, mask in enumerate(drawn):
        mask[4:25, 5 + number : 30 + number] = 255
        mask[10:20, 10:20] = 0
    write.images(tmp_path / "masks", drawn)
    (tmp_path / "boxes.csv").write_text(
        "frame,xmin,ymin,xmax,ymax\n"
        + "".join(f"frame_{n},{5 + n},4,{30 + n},25\n" for n in range(3))
    )
    for masks, same in ((True, False), (False, True)):
        bundle = small_bundle(outline="mask" if masks else "box", scope=WARD)
        numbers = [
            predict(sources["folder"], locations, bundle, scope="ward").frames["predicted_mm"]
            for locations in (
                MaskLocations(tmp_path / "masks"), CsvLocations(tmp_path / "boxes.csv"),
            )
        ]  # fmt: skip
        assert (numbers[0] == numbers[1]).all() == same


def test_frames_without_a_polyp_abstain(sources, bundle, refused):
    segmenter = Segmenter(48)
    nn.init.zeros_(segmenter.head.weight)
    nn.init.constant_(segmenter.head.bias, -5.0)
    prediction = predict(sources["folder"], AutomaticLocations(segmenter), bundle)
    assert prediction.frames["reasons"].tolist() == ["no polyp found"] * 3
    assert prediction.frames["predicted_mm"].isna().all()
    refused(
        "no polyp found on any of 3 frames; give boxes or masks", objects_of, prediction, bundle
    )


def test_abstention_names_its_reason(sources, boxes, pictures):
    images = np.random.default_rng(0).integers(0, 255, (100, 64, 64, 3)).astype(np.uint8)
    limits = fit_quality(images, np.tile([10.0, 10.0, 30.0, 30.0], (100, 1)))
    prediction = predict(sources["folder"], CsvLocations(boxes), small_bundle(quality=limits))
    assert all("out of distribution" in r for r in prediction.frames["reasons"])
    assert objects_of(prediction, small_bundle())["abstained"].all()


def test_outputs_name_no_patient(sources, boxes, bundle):
    for name in ("dicom", "dicom video"):
        prediction = predict(sources[name], CsvLocations(boxes), bundle)
        text = prediction.frames.to_csv() + objects_of(prediction, bundle).to_csv()
        text += "\n".join(prediction.input.lines() + prediction.locations.lines())
        assert "secret" not in text.lower()
        assert prediction.input.source in text


def test_depth_cannot_be_read_from_a_source(sources, boxes, refused):
    refused(
        "needs depths",
        predict,
        sources["folder"],
        CsvLocations(boxes),
        small_bundle(("rgb", "depth")),
    )


def test_classes_come_with_probabilities(sources, boxes):
    prediction = predict(sources["folder"], CsvLocations(boxes), small_bundle(target=Classes()))
    probabilities = prediction.frames[["p_diminutive", "p_small", "p_large"]]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("target", [LogSize(), ScaledMillimeters(), Ordinal(), Classes()])
def test_a_bundle_survives_the_disk(tmp_path, sources, boxes, target):
    bundle = small_bundle(
        target=target, aperture=0.9, scope=Scope("tubes", ("tubes",), 7.0), outline="box",
        intervals={"boxes": residuals(0.3)}, facts={"objects": 150},
    )  # fmt: skip
    again = load_bundle(bundle.save(tmp_path / "bundle"))
    assert again.config() == bundle.config()
    locations = [CsvLocations(boxes), CsvLocations(boxes)]
    expected = predict(sources["folder"], locations[0], bundle)
    assert_same_numbers(predict(sources["folder"], locations[1], again), expected)
    card = (tmp_path / "bundle" / "README.md").read_text()
    for words in ("research only", "tubes", "no millimeter calibration for this scope", "150"):
        assert words in card
    small = load_bundle(bundle.save(tmp_path / "half", torch.bfloat16))
    found = predict(sources["folder"], CsvLocations(boxes), small)
    ratio = found.frames["predicted_mm"] / expected.frames["predicted_mm"]
    assert 0 < (ratio - 1).abs().max() < 0.03


DAMAGES = {
    "absent": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "config": lambda folder: (folder / "config.json").write_text("{"),
    "weights": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "format": lambda folder: (folder / "config.json").write_text('{"format": 99}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_in_one_line(tmp_path, refused, damage):
    folder = small_bundle().save(tmp_path / "bundle")
    DAMAGES[damage](folder)
    refused(str(folder), load_bundle, folder)


@pytest.mark.parametrize("container", ["folder", "video", "dicom"])
def test_tracks_show_the_frames_and_boxes_of_the_source(container, sources, boxes, pictures):
    bundle = small_bundle(intervals={"boxes": residuals(0.3)}, scope=Scope(reference_mm=2.0))
    prediction = predict(sources[container], CsvLocations(boxes), bundle, objects="source")
    objects = objects_of(prediction, bundle)
    [track] = tracks_of(prediction, objects, bundle.scope, sources[container])
    for image, picture in zip(track.images, pictures, strict=True):
        height, width = picture.shape[:2]
        assert np.array_equal(image[:height, :width], picture)
    assert track.boxes.tolist() == [[5 + n, 30 + n, 4, 25] for n in range(3)]
    np.testing.assert_allclose(2 * track.sizes, prediction.frames["predicted_mm"])
    assert np.isnan(track.high)
    assert "no millimeter calibration for this scope" in track.caption()
    calibrated = dataclasses.replace(prediction, scope="ward")
    objects = objects_of(calibrated, dataclasses.replace(bundle, scope=WARD))
    [track] = tracks_of(calibrated, objects, WARD, sources[container])
    np.testing.assert_allclose(track.high, objects["upper_mm"])
    assert track.caption().startswith(f"predicted {track.size:.1f} mm (")
    known = dataclasses.replace(track, truth=6.1, size=6.8, low=np.nan)
    assert known.caption() == "true 6.1 mm, predicted 6.8 mm"
    np.testing.assert_allclose(track.sizes, prediction.frames["predicted_mm"])
