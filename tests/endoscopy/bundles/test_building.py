import numpy as np
import pytest
import torch

from core_gates.errors import GatesError
from endoscopy.bundles.building import (
    bundle_of,
    frame_predictions,
    part_predictions,
    rounded_bundle,
)
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.evaluation.frames import predictions_of
from endoscopy.inference.in_memory import frames_of, predictor_of, without_mask
from endoscopy.models import tiny_resnet
from endoscopy.renderer.config import RendererConfig
from endoscopy.renderer.dataset import render_dataset
from endoscopy.training.module import SizingModule


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


def test_weights_are_those_that_are_stored(module, data, tmp_path):
    bundle = rounded_bundle(module, data)
    for value in bundle.model.state_dict().values():
        if value.is_floating_point():
            assert torch.equal(value, value.bfloat16().float())
    assert bundle.masks


def test_predictions_carry_the_rows_of_the_test_objects(module, data):
    bundle = bundle_of(module, data, facts={"seed": 3})
    found = part_predictions(bundle, data, "test", reasons=True)
    assert len(found) == 8
    table = data.load().frames
    expected = table.iloc[data.evaluation_rows("test")]
    assert found["unique_id"].tolist() == expected["unique_id"].tolist()
    assert found["gt"].tolist() == expected["gt"].tolist()
    rows = data.evaluation_rows("test")[[5, 2]]
    again = frame_predictions(bundle, data.frames(), rows)["predicted_mm"].to_numpy()
    assert np.allclose(again, found["predicted_mm"].to_numpy()[[5, 2]], rtol=1e-5)
    assert bundle.facts == {"training objects": 6, "seed": 3}


def test_scope_and_reference_come_from_the_training_objects(module, data):
    bundle = bundle_of(module, data)
    train = data.load().frames.iloc[data.rows("train")].drop_duplicates("unique_id")
    assert np.isclose(bundle.scope.reference_mm, np.exp(np.log(train["gt"]).mean()))
    assert bundle.scope.calibrated_for == ("synthetic",)


def test_intervals_need_calibration_objects_enough(module, data, monkeypatch):
    assert bundle_of(module, data).conformal is None
    monkeypatch.setattr("endoscopy.bundles.building.MINIMUM", 4)
    with pytest.raises(GatesError, match="found 4 calibration objects"):
        bundle_of(module, data)  # the evaluation insists on its own number


def test_frames_in_memory_are_predicted_as_those_on_disk(module, data):
    bundle = rounded_bundle(module, data)
    source = data.variant(streams=["rgb_mask_depth"]).frames()
    rows = data.evaluation_rows("test")
    frames = frames_of(source, rows)
    found = predictions_of(predictor_of(bundle), frames)
    expected = part_predictions(bundle, data, "test")
    assert np.allclose(found["predicted_mm"], expected["predicted_mm"], rtol=1e-5)
    assert frames.depths is not None
    assert frames.depths.max() > 1
    kept, empty = without_mask(frames.with_(masks=frames.masks & (np.arange(8) > 1)[:, None, None]))
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


def test_frames_of_another_size_are_refused(module, data):
    bundle = rounded_bundle(module, data)
    bundle.image_size = 64
    frames = frames_of(data.frames(), data.evaluation_rows("test"))
    with pytest.raises(GatesError, match="frames have 32 pixels, the network takes 64"):
        predictor_of(bundle)(frames)


def test_variants_of_data_share_table_and_parts(data):
    other = data.variant(seed=5, train_objects=3)
    assert other.load() is data.load()
    drawn = set(data.load().object_codes[other.rows("train")])
    pool = set(data.load().object_codes[data.rows("train")])
    assert len(drawn) == 3
    assert drawn < pool
    assert np.array_equal(other.rows("test"), data.rows("test"))
    draws = {tuple(data.variant(seed=seed, train_objects=3).rows("train")) for seed in range(6)}
    assert len(draws) > 1
    assert np.array_equal(data.variant(seed=5, train_objects=3).rows("train"), other.rows("train"))
    with pytest.raises(GatesError, match="7 objects cannot be drawn from 6"):
        data.variant(train_objects=7)


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
    assert len(other.rows("train")) == 28
    assert len(other.rows("calibration")) == 0
    assert other.streams == data.streams
    assert data.counts[0] == 6


def test_a_pass_leaves_the_global_random_numbers_alone(data):
    loader = data.loader("train")
    before = torch.get_rng_state()
    assert len(list(loader)) == len(loader)
    assert torch.equal(torch.get_rng_state(), before)
