"""Which loaders ignore a dialect, as measured."""

import pytest

from diffusion.lora_file import affected, load_lora

CASES = [
    ("diffusers_flux", "lora_A", "", "nothing"),
    ("diffusers_flux", "lora_A", "transformer.", None),
    ("diffusers_flux", "lora_A", "base_model.model.", "error"),
    ("bfl", "lora_A", "", "nothing"),
    ("bfl", "lora_A", "diffusion_model.", "nothing"),
    ("bfl", "lora_down", "lora_unet_", "part"),
    ("native_sd3", "lora_down", "lora_unet_", "nothing"),
    ("diffusers_flux", "lora_down", "lora_unet_", "error"),
    ("xlabs", "_lora", "", None),
    ("processors_flux", "_lora", "transformer.", None),
    ("diffusers_flux", "lora_linear_layer", "transformer.", "error"),
    ("bfl", "loha", "lora_unet_", "nothing"),
    ("bfl", "lokr wf", "lora_unet_", "nothing"),
    ("diffusers_flux", "dora rows", "transformer.", "part"),
]


@pytest.mark.parametrize(("names", "kind", "prefix", "effect"), CASES)
def test_effects(names, kind, prefix, effect, dialects, tmp_path):
    written = dialects.write(names, kind, prefix)
    bundle = load_lora(written.save(tmp_path / "a.safetensors"), written.family)
    found = affected(bundle.report)
    assert effect in ({rule.effect for rule in found} or {None})
    assert all(0 < count <= len(bundle.report.fates) for count in found.values())


def test_layers_within_blocks_of_kohya_are_read_whole(dialects, tmp_path):
    written = dialects.write("bfl", "lora_down", "lora_unet_")
    blocks = {key: tensor for key, tensor in written.tensors.items() if "blocks" in key}
    path = written._replace(tensors=blocks).save(tmp_path / "a.safetensors")
    assert affected(load_lora(path).report) == {}
