"""Millimeters are shown for a named scope and for nothing else."""

import json

import pandas as pd
import pytest

from endoscopy.bundles.sizing_bundle import NO_CALIBRATION, Scope, source_scope

TABLE = pd.DataFrame({"predicted_mm": [4.0, 12.0], "lower_mm": [3.0, 9.0], "upper_mm": [5.0, 16.0]})


def test_the_scope_of_training_gets_millimeters():
    scope = Scope()
    assert scope.express(TABLE, "synthetic") is TABLE
    assert "millimeters are calibrated" in scope.lines("synthetic")[0]
    assert "research only" in scope.lines("synthetic")[0]


@pytest.mark.parametrize("source", [None, "sun", "Synthetic"])
def test_any_other_scope_gets_an_index(source):
    shown = Scope(reference_mm=8.0).express(TABLE, source)
    assert not [name for name in shown if "mm" in name]
    assert shown["size_index"].tolist() == [0.5, 1.5]
    assert not [name for name in shown if "upper" in name or "lower" in name]
    assert set(shown["note"]) == {NO_CALIBRATION} == {"no millimeter calibration for this scope"}
    assert any(NO_CALIBRATION in line for line in Scope().lines(source))
    of_classes = TABLE.assign(
        p_diminutive=0.5, p_small=0.3, p_large=0.2, size_class="small", interval_crosses="5 mm"
    )
    assert list(Scope().express(of_classes, source)) == list(shown)


def test_the_manifest_names_the_scope(tmp_path, refused):
    frames = tmp_path / "001-001_frames"
    frames.mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps({"scope": "synthetic"}))
    (tmp_path / "clip.mp4").write_bytes(b"")
    for source in (tmp_path, frames, tmp_path / "clip.mp4", frames / "001-001_1.jpg"):
        assert source_scope(source) == "synthetic"
    refused("manifest names the scope 'synthetic', not 'sun'", source_scope, frames, "sun")


def test_nobody_can_claim_that_frames_are_synthetic(tmp_path, refused):
    assert source_scope(tmp_path) is None
    assert source_scope(tmp_path, "sun") == "sun"
    refused(r"has no manifest\.json", source_scope, tmp_path, "synthetic")


@pytest.mark.parametrize("content", ["no json", "[]", '{"scope": 3}', "{}"])
def test_a_strange_manifest_names_nothing(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert source_scope(tmp_path) is None


def test_a_reference_must_be_positive(refused):
    refused("must be positive", Scope, reference_mm=0.0, error=ValueError)
