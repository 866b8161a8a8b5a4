"""Layers from a configuration, compared with the models that diffusers builds from it."""

import json

import pytest
import torch
from torch import nn

from diffusion.lora_file import ContainerError, FamilyError
from diffusion.lora_file.recognition import modules_in

TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
}
CASES = {
    "flux": (
        "FluxTransformer2DModel",
        {**TINY, "num_single_layers": 3, "axes_dims_rope": (4, 6, 6)},
    ),
    "guided": ("FluxTransformer2DModel", {**TINY, "guidance_embeds": True, "in_channels": 48}),
    "control": ("FluxTransformer2DModel", {**TINY, "in_channels": 384, "out_channels": 64}),
    "sd3": ("SD3Transformer2DModel", {**TINY, "caption_projection_dim": 32}),
    "sd3.5": (
        "SD3Transformer2DModel",
        {**TINY, "caption_projection_dim": 32, "dual_attention_layers": (0,), "patch_size": 1},
    ),
}


def linears(model):
    found = model.named_modules()
    return {n: (m.in_features, m.out_features) for n, m in found if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("name", CASES)
def test_layers_are_those_of_diffusers(name, tmp_path):
    import diffusers

    kind, options = CASES[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**options)
    model.save_config(tmp_path / "transformer")
    expected = linears(model)
    assert modules_in(tmp_path) == expected
    assert modules_in(tmp_path / "transformer") == expected
    assert len(expected) > 20


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FamilyError, "holds no model of diffusers"),
        ("[]", ContainerError, "is a JSON list, expected an object"),
        ('{"_class_name": "UNet"}', FamilyError, "is of class 'UNet', expected FluxTransformer"),
        ('{"_class_name": "SD3Transformer2DModel"}', FamilyError, "num_layers is None, expected"),
        (
            json.dumps({"_class_name": "FluxTransformer2DModel", **TINY, "num_layers": True}),
            FamilyError,
            "num_layers is True, expected a positive integer",
        ),
        (" " * 2**21, FamilyError, "is larger than the limit"),
    ],
    ids=range(6),
)
def test_damaged_configurations(content, error, words, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=words):
        modules_in(tmp_path)
