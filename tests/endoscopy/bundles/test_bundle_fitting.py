"""A trained network becomes a bundle, and sizes frames alike through every door."""

import shutil

import numpy as np
import pytest
import torch

from endoscopy import SizingModule
from endoscopy.bundles.bundle_fitting import (
    bundle_of,
    frame_predictions,
    part_predictions,
    refuse_trained,
    rounded_bundle,
)
from endoscopy.bundles.sizing_bundle import Provenance, load_bundle, model_card
from endoscopy.data.images import Frame
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.data.streams import InputForm, box_masks, ellipse_masks, network_input, outline_of
from endoscopy.evaluation.rendered_frames import predictions_of
from endoscopy.inputs.locations import MaskLocations, VocLocations
from endoscopy.metrics import object_table
from endoscopy.models import tiny_resnet
from endoscopy.prediction import drop_unmasked, frames_of, predict, predictor_of
from endoscopy.renderer import RendererConfig, render_dataset
from endoscopy.segmenter import Segmenter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rendered") / "set"
    list(render_dataset(root, RendererConfig(side=32, frames=2), 16))
    return root


def data_of(folder, **options):
    counts = {"train_objects": 6, "validation_objects": 2, "test_objects": 4}
    options = counts | {"calibration_objects": 4, "streams": ["rgb_mask"]} | options
    data = PolypSizingDataModule(synthetic=str(folder), split="counts", size=32, **options)
    data.load()
    return data


@pytest.fixture
def data(folder):
    return data_of(folder)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return SizingModule(tiny_resnet(trunk_options={"widths": [4, 4, 8], "depths": [1, 1]}))


def test_predictions_carry_the_rows_of_the_test_objects(module, data):
    bundle = bundle_of(module, data, facts={"seed": 3})
    weights = [value for value in bundle.model.state_dict().values() if value.is_floating_point()]
    assert all(torch.equal(value, value.bfloat16().float()) for value in weights)
    assert (bundle.outline, bundle.intervals) == ("mask", {})  # with 4 objects to calibrate
    found = part_predictions(bundle, data, "test", reasons=True)
    assert len(found) == 8
    expected = data.load().frames.iloc[data.evaluation_rows("test")]
    assert found["unique_id"].tolist() == expected["unique_id"].tolist()
    assert found["gt"].tolist() == expected["gt"].tolist()
    rows = data.evaluation_rows("test")[[5, 2]]
    again = frame_predictions(bundle, data.frames(), rows)["predicted_mm"].to_numpy()
    assert np.allclose(again, found["predicted_mm"].to_numpy()[[5, 2]], rtol=1e-5)
    assert bundle.facts.pop("held out").startswith("MAPE ")
    assert bundle.facts == {"training objects": 6, "seed": 3}


@pytest.mark.parametrize("part", ["test", "calibration"])
def test_a_network_that_has_seen_held_out_objects_is_refused(module, data, part, refused):
    bundle = rounded_bundle(module, data)
    bundle.training = Provenance({}, tuple(data.object_keys("train")))
    refuse_trained(bundle, data)
    bundle.training = Provenance({}, (*data.object_keys("train"), data.object_keys(part)[0]))
    refused(f"was trained on 1 of 4 {part} objects", refuse_trained, bundle, data)


def test_scope_and_reference_come_from_the_training_objects(module, data):
    bundle = bundle_of(module, data)
    train = data.load().frames.iloc[data.rows("train")].drop_duplicates("unique_id")
    assert np.isclose(bundle.scope.reference_mm, np.exp(np.log(train["gt"]).mean()))
    assert bundle.scope.trained_on == "synthetic"


@pytest.mark.fault("endoscopy A5")
@pytest.mark.parametrize(
    ("error", "objects", "calibrated"),
    [(0.05, 8, ("synthetic",)), (0.05, 4, ()), (None, 8, ())],
)
def test_millimeters_are_calibrated_only_where_a_constant_is_beaten(
    module, folder, monkeypatch, error, objects, calibrated
):
    """Four objects are too few to show it, whatever the errors."""
    data = data_of(folder, train_objects=4, test_objects=2, calibration_objects=objects)

    def planted(bundle, frames, located):
        table = data.load().frames.loc[[row for row, _ in located]].reset_index(drop=True)
        mm = table["gt"] * (1 + error) if error else 6.5 + 0 * table["gt"]
        return table.assign(predicted_mm=mm)

    monkeypatch.setattr("endoscopy.bundles.bundle_fitting._sized", planted)
    bundle = bundle_of(module, data)
    assert (bundle.scope.calibrated_for, bundle.scope.trained_on) == (calibrated, "synthetic")
    words = "better than a constant" if calibrated else "no better than a constant"
    assert words in bundle.facts["held out"]
    card = model_card(bundle.config())
    assert f"Millimeters are calibrated for: {'synthetic' if calibrated else 'nothing'}." in card
    assert bundle.scope.is_calibrated("synthetic") == bool(calibrated)


@pytest.mark.fault("endoscopy A3")
def test_every_way_of_locating_lesions_has_intervals_of_its_own(module, folder, monkeypatch):
    monkeypatch.setattr("endoscopy.bundles.bundle_fitting.MINIMUM", 10)
    data = data_of(folder, train_objects=2, validation_objects=1, test_objects=1,
                   calibration_objects=12)  # fmt: skip
    segmenter = Segmenter(32)
    torch.nn.init.constant_(segmenter.head.bias, 0.0)
    bundle = bundle_of(module, data, segmenter=segmenter)
    assert set(bundle.intervals) == {"masks", "boxes", "automatic"}
    found = part_predictions(bundle, data, "calibration")
    errors = np.log(object_table(found)["predicted_mm"]) - np.log(object_table(found)["gt"])
    np.testing.assert_allclose(bundle.intervals["masks"].residuals, np.sort(errors), rtol=1e-4)
    assert bundle.conformal == bundle.intervals["masks"]
    assert len({one.residuals for one in bundle.intervals.values()}) == 3
    assert load_bundle(bundle.save(folder.parent / "bundle")).intervals == bundle.intervals


@pytest.mark.fault("endoscopy A3")
def test_a_network_of_boxes_has_one_interval_for_masks_and_boxes(folder, monkeypatch):
    monkeypatch.setattr("endoscopy.bundles.bundle_fitting.MINIMUM", 10)
    data = data_of(folder, train_objects=2, validation_objects=1, test_objects=1,
                   calibration_objects=12, streams=["crop"])  # fmt: skip
    torch.manual_seed(0)
    options = {"widths": [4, 4, 8], "depths": [1, 1]}
    bundle = bundle_of(SizingModule(tiny_resnet(["crop"], trunk_options=options)), data)
    assert bundle.intervals["masks"] == bundle.intervals["boxes"] == bundle.conformal


def test_frames_in_memory_are_predicted_as_those_on_disk(module, data):
    bundle = rounded_bundle(module, data)
    source = data.variant(streams=["rgb_mask_depth"]).frames()
    frames = frames_of(source, data.evaluation_rows("test"))
    found = predictions_of(predictor_of(bundle), frames)
    expected = part_predictions(bundle, data, "test")
    assert np.allclose(found["predicted_mm"], expected["predicted_mm"], rtol=1e-5)
    assert frames.depths is not None
    assert frames.depths.max() > 1
    kept, empty = drop_unmasked(
        frames.with_(masks=frames.masks & (np.arange(8) > 1)[:, None, None])
    )
    assert (len(kept), empty) == (6, 2)


def test_depths_in_other_units_are_brought_to_millimeters(data):
    torch.manual_seed(0)
    module = SizingModule(
        tiny_resnet(["rgb_mask_depth"], trunk_options={"widths": [4, 4, 8], "depths": [1, 1]})
    )
    bundle = rounded_bundle(module, data)
    source = data.variant(streams=["rgb_mask_depth"]).frames()
    frames = frames_of(source, data.evaluation_rows("test"))
    assert frames.depths is not None
    scaled = frames.with_(depths=frames.depths / 4)
    direct = predictor_of(bundle)(frames)
    assert np.allclose(predictor_of(bundle, depth_factor=4.0)(scaled), direct, rtol=1e-4)
    assert not np.allclose(predictor_of(bundle)(scaled), direct, rtol=1e-4)


def test_frames_of_another_size_are_refused(module, data, refused):
    bundle = rounded_bundle(module, data)
    bundle.image_size = 64
    frames = frames_of(data.frames(), data.evaluation_rows("test"))
    refused("frames have 32 pixels, the network takes 64", predictor_of(bundle), frames)


def test_variants_of_data_share_table_and_parts(data, refused):
    other = data.variant(seed=5, train_objects=3)
    assert other.load() is data.load()
    drawn, pool = (set(data.load().object_codes[one.rows("train")]) for one in (other, data))
    assert drawn < pool
    assert len(drawn) == 3
    assert np.array_equal(other.rows("test"), data.rows("test"))
    draws = [data.variant(seed=seed, train_objects=3).rows("train").tolist() for seed in range(6)]
    assert draws[5] == other.rows("train").tolist()
    assert len(set(map(tuple, draws))) > 1
    refused("7 objects cannot be drawn from 6", data.variant, train_objects=7)


def test_a_variant_with_depth_makes_a_cache_of_its_own(folder, tmp_path):
    data = data_of(folder, cache_folder=str(tmp_path / "cache"))
    data.prepare_data()
    assert data.variant(streams=["crop"]).cache is data.cache
    deep = data.variant(streams=["rgb_mask_depth"])
    assert deep.cache is None
    deep.prepare_data()
    deep.setup("fit")
    assert deep.frames().sample(int(deep.rows("train")[0])).frame.depth is not None


def test_data_elsewhere_has_only_a_training_part_of_size(folder, data):
    other = data.elsewhere(str(folder), 14)
    other.load()
    assert (len(other.rows("train")), len(other.rows("calibration"))) == (28, 0)
    assert other.streams == data.streams
    assert data.counts[0] == 6


SIZE = 32


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("rendered") / "set"
    list(render_dataset(root, RendererConfig(side=48, frames=3), 12))
    return root


@pytest.fixture(scope="module")
def boxes_only(rendered, tmp_path_factory):
    """The same frames as a data set of boxes, such as REAL-Colon, has them."""
    root = tmp_path_factory.mktemp("boxes") / "set"
    shutil.copytree(rendered, root, ignore=shutil.ignore_patterns("*_masks", "*_depths"))
    return root


def small_data(folder):
    data = PolypSizingDataModule(
        synthetic=str(folder), split="counts", train_objects=8, validation_objects=2,
        test_objects=2, streams=["rgb_mask"], size=SIZE, augmentation="none", batch_size=7,
    )  # fmt: skip
    data.load()
    return data


def bundle_for(data):
    torch.manual_seed(0)
    model = tiny_resnet(trunk_options={"widths": [4, 4, 8], "depths": [1, 1]}, geometry=True)
    return rounded_bundle(SizingModule(model), data)


def through_the_loader(bundle, data):
    """Sizes of the training frames as the network sees them while it learns, by row."""
    found = {}
    for batch in data.loader("train"):
        with torch.no_grad():
            raw = bundle.model(batch["streams"], batch["geometry"])
        sizes = bundle.target.decode(raw).tolist()
        found |= dict(zip(batch["frame"].tolist(), sizes, strict=True))
    return found


def through_predict(bundle, data, folder, locator, rows):
    """Sizes that ``gates endoscopy predict`` gives for the frames of some rows."""
    table = data.load().frames
    found = []
    for row in rows:
        video = table["unique_id"][row].rpartition("_")[0]
        result = predict(
            folder / f"{video}_frames", locator(folder, video), bundle, scope="synthetic"
        ).frames
        key = f"{video}_{table['frame_id'][row]}"
        mine = (result["frame_id"] == key) & (result["unique_id"] == table["unique_id"][row])
        found.append(float(result.loc[mine if mine.any() else result["frame_id"] == key,
                                      "predicted_mm"].iloc[0]))  # fmt: skip
    return found


def boxes(folder, video):
    return VocLocations(folder / f"{video}_annotations")


def masks(folder, video):
    return MaskLocations(folder / f"{video}_masks")


@pytest.mark.fault("endoscopy A2")
@pytest.mark.parametrize("kind", ["boxes only", "masks"])
def test_every_door_leads_to_the_same_size(kind, rendered, boxes_only):
    folder = boxes_only if kind == "boxes only" else rendered
    data = small_data(folder)
    bundle = bundle_for(data)
    assert bundle.outline == {"boxes only": "box", "masks": "mask"}[kind]
    loaded = through_the_loader(bundle, data)
    rows = np.array(sorted(loaded)[::5])
    expected = [loaded[int(row)] for row in rows]
    assert len(set(expected)) == len(rows) > 3
    frames = data.frames()
    table = frame_predictions(bundle, frames, rows)["predicted_mm"]
    np.testing.assert_allclose(table, expected, rtol=1e-5)
    memory = predictor_of(bundle)(frames_of(frames, rows, bundle.outline))
    np.testing.assert_allclose(memory, expected, rtol=1e-5)
    locator = boxes if kind == "boxes only" else masks
    np.testing.assert_allclose(
        through_predict(bundle, data, folder, locator, rows), expected, rtol=1e-5
    )


@pytest.mark.fault("endoscopy A2")
def test_a_network_of_masks_sees_boxes_alike_in_evaluation_and_prediction(rendered, boxes_only):
    bundle, data = bundle_for(small_data(rendered)), small_data(boxes_only)
    rows = data.rows("train")[::5]
    table = frame_predictions(bundle, data.frames(), rows)["predicted_mm"]
    found = through_predict(bundle, data, rendered, boxes, rows)
    np.testing.assert_allclose(found, table, rtol=1e-5)
    filled = bundle_for(data)
    assert not np.allclose(frame_predictions(filled, data.frames(), rows)["predicted_mm"], table)


@pytest.mark.fault("endoscopy A2")
def test_outlines_are_those_of_training():
    frame = Frame(np.zeros((20, 20, 3), np.uint8), (3.0, 4.0, 13.0, 16.0))
    mask = np.zeros((20, 20), np.uint8)
    mask[5:9, 5:9] = 1
    known, box = frame._replace(mask=mask), np.array([frame.box])
    filled, ellipse = box_masks(box, 20, 20)[0], ellipse_masks(box, 20, 20)[0]
    expected = {"mask": (mask, ellipse), "either": (mask, filled), "box": (filled, filled)}
    for outline, pair in expected.items():
        found = [outline_of(one, outline) for one in (known, frame)]
        np.testing.assert_array_equal(found, pair)


def test_a_table_with_some_masks_trains_on_masks_and_boxes(rendered):
    data = small_data(rendered)
    frames = data.load().frames
    frames.loc[data.rows("train")[::2], "mask_path"] = ""
    assert data.form.outline == "either"
    frames["mask_path"] = ""
    assert (data.form.outline, data.variant(streams=["crop"]).form.outline) == ("box", "box")


def test_frames_of_any_size_are_resized():
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    large = Frame(image, (16.0, 12.0, 32.0, 36.0))
    inputs = network_input([large], InputForm(("rgb_mask", "loc"), SIZE))
    assert {name: tuple(s.shape) for name, s in inputs.streams.items()} == {
        "rgb_mask": (1, 4, SIZE, SIZE),
        "loc": (1, 3, SIZE, SIZE),
    }
    assert inputs.geometry.tolist()[0] == pytest.approx([np.log(0.25), np.log(0.5), 0.375, 0.5])
