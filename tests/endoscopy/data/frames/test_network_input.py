"""One way from a frame to a network: the same numbers through every door."""

import shutil

import numpy as np
import pytest
import torch

from endoscopy.bundles.bundle_fitting import frame_predictions, rounded_bundle
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.data.streams import InputForm, box_masks, ellipse_masks, network_input, outline_of
from endoscopy.data.transforms import Frame
from endoscopy.inputs.boxes import VocLocations
from endoscopy.inputs.locations import MaskLocations
from endoscopy.models import tiny_resnet
from endoscopy.prediction import frames_of, predict, predictor_of
from endoscopy.renderer.rendered_dataset import render_dataset
from endoscopy.renderer.scene import RendererConfig
from endoscopy.training.sizing_module import SizingModule

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


def data_of(folder):
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
    data = data_of(folder)
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
    bundle, data = bundle_for(data_of(rendered)), data_of(boxes_only)
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
    known = frame._replace(mask=mask)
    box = np.array([frame.box])
    filled, ellipse = box_masks(box, 20, 20)[0], ellipse_masks(box, 20, 20)[0]
    assert np.array_equal(outline_of(known, "mask"), mask)
    assert np.array_equal(outline_of(frame, "mask"), ellipse)
    assert np.array_equal(outline_of(known, "either"), mask)
    assert np.array_equal(outline_of(frame, "either"), filled)
    assert np.array_equal(outline_of(known, "box"), filled)
    assert np.array_equal(outline_of(frame, "box"), filled)


def test_a_table_with_some_masks_trains_on_masks_and_boxes(rendered):
    data = data_of(rendered)
    frames = data.load().frames
    frames.loc[data.rows("train")[::2], "mask_path"] = ""
    assert data.form.outline == "either"
    frames["mask_path"] = ""
    assert data.form.outline == "box"
    assert data.variant(streams=["crop"]).form.outline == "box"


def test_frames_of_any_size_are_resized():
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    large = Frame(image, (16.0, 12.0, 32.0, 36.0))
    inputs = network_input([large], InputForm(("rgb_mask", "loc"), SIZE))
    assert {name: tuple(s.shape) for name, s in inputs.streams.items()} == {
        "rgb_mask": (1, 4, SIZE, SIZE),
        "loc": (1, 3, SIZE, SIZE),
    }
    assert inputs.geometry.tolist()[0] == pytest.approx([np.log(0.25), np.log(0.5), 0.375, 0.5])
