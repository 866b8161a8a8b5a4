"""Samples of eight formats with ΔW computed independently in float64."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.lora_file import load_lora

FORMATS = Path(__file__).parents[2] / "golden" / "autolora" / "formats"
FAMILIES = {"kohya_sd3": "sd3"}
SAMPLES = sorted(path.stem for path in FORMATS.glob("*.safetensors"))


def test_all_samples_are_there():
    assert len(SAMPLES) == 8


@pytest.mark.parametrize("name", SAMPLES)
def test_sample(name, relative_error):
    bundle = load_lora(FORMATS / f"{name}.safetensors")
    with np.load(FORMATS / f"{name}.expected.npz") as expected:
        assert relative_error(bundle, dict(expected)) <= 1e-6
    assert (bundle.family, bundle.report.unused) == (FAMILIES.get(name, "flux"), ())
    assert all(fate.modules for fate in bundle.report.fates)


def test_metadata_is_kept():
    bundle = load_lora(FORMATS / "kohya_flux_full.safetensors")
    assert (bundle.metadata["modelspec.trigger_phrase"], len(bundle.metadata)) == ("demo style", 12)


def test_ranks_and_scales_of_each_layer():
    bundle = load_lora(FORMATS / "kohya_flux_full.safetensors")
    assert bundle.ranks()["transformer_blocks.0.attn.to_q"] == 4
    assert bundle.modules["transformer_blocks.0.attn.to_q"].scale == 0.5
    assert bundle.ranks()["transformer_blocks.0.attn.to_out.0"] == 3
    assert bundle.modules["single_transformer_blocks.0.proj_out"].scale == 1.0
