import numpy as np
import pytest

from endoscopy.data.streams import boxes_of
from endoscopy.evaluation.baselines import AREA, LOCAL_FIXED, METRIC, ladder
from endoscopy.evaluation.rendered_frames import rendered_features, rendered_frames
from endoscopy.renderer import RendererConfig, render_objects

CONFIG = RendererConfig(seed=5, side=32, frames=2)


def test_rendered_objects_are_frames():
    rendered = render_objects(CONFIG, [3, 4, 9])
    frames = rendered_frames(rendered, exposure="fixed")
    assert (len(frames), frames.images.shape) == (6, (6, 32, 32, 3))
    np.testing.assert_array_equal(frames.images[2], rendered.images[1, 0].permute(1, 2, 0))
    np.testing.assert_array_equal(boxes_of(frames.masks), frames.boxes)
    assert frames.objects.tolist() == ["object 3"] * 2 + ["object 4"] * 2 + ["object 9"] * 2
    assert frames.gt[4] == rendered.size_mm[2]
    assert frames.table["distance_mm"].tolist() == rendered.distance_mm.flatten().tolist()
    assert frames.table["bbox_xmax"].tolist() == frames.boxes[:, 2].tolist()
    assert (frames.table[["height", "width"]] == 32).all(axis=None)
    assert (frames.table["exposure"] == "fixed").all()


def test_the_renderer_lets_depth_and_light_tell_the_size():
    done = []
    train = rendered_features(CONFIG, range(50), tick=done.append)
    assert done == [50]
    test = rendered_features(CONFIG, range(100, 140))
    np.testing.assert_array_equal(train["agc"]["log_extent"], train["fixed"]["log_extent"])
    assert (train["agc"]["local_brightness"] != train["fixed"]["local_brightness"]).any()
    mape = ladder(train, test, resamples=100).set_index("features")["mape"]
    assert mape[METRIC] < 0.25
    assert mape[LOCAL_FIXED] < 0.25
    assert max(mape[METRIC], mape[LOCAL_FIXED]) < 0.8 * mape[AREA]
    assert mape["constant"] == pytest.approx(0.64, abs=0.2)
