"""The folder of a prediction: replaced whole, and one file for every frame."""

import json

import pytest

from apps.endoscopy.predict import Outputs, file_name


def outputs_with(folder, text):
    """Outputs that are complete but for the last step."""
    outputs = Outputs(folder, text)
    outputs.partial.mkdir(exist_ok=True)
    (outputs.partial / "report.json").write_text(json.dumps({"fingerprint": text}))
    return outputs


@pytest.mark.fault("46 H4")
def test_what_a_killed_replacement_left_is_removed_before_frames_are_sized(tmp_path):
    folder = outputs_with(tmp_path / "video", "first").finish()
    stale = tmp_path / ".video.old"
    stale.mkdir()
    (stale / "report.json").write_text("{}")
    outputs = outputs_with(folder, "second")
    assert not stale.exists()
    outputs.finish()
    assert Outputs(folder, "second").is_complete()
    assert [path.name for path in tmp_path.iterdir()] == ["video"]


@pytest.mark.fault("46 H4")
def test_older_outputs_come_back_where_new_ones_never_took_their_place(tmp_path):
    folder = outputs_with(tmp_path / "video", "first").finish()
    folder.rename(tmp_path / ".video.old")
    assert Outputs(folder, "first").is_complete()


@pytest.mark.fault("46 H4")
def test_what_was_killed_just_before_it_took_its_place_is_predicted_again(tmp_path):
    """Where ``--resume`` ended in an error of a hidden file that is not there."""
    assert outputs_with(tmp_path / "video", "first").kept() is None


@pytest.mark.fault("46 H4")
def test_every_frame_has_its_file():
    keys = ["a/b.png", "a__b.png", "a%2Fb.png", "a/b_0.png", "a_b.png", "1.2#1", "1.2_1"]
    assert len({file_name(key) for key in keys}) == len(keys)
    assert not any("/" in file_name(key) for key in keys)
