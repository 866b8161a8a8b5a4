"""Our files in the loaders of diffusers and PEFT, and theirs in ours."""

import copy

import pytest
import torch

from diffusion.evaluation.parity.files.exports import (
    drawn,
    linears,
    merged_by_diffusers,
    small_flux,
    small_sd3,
    weight_errors,
)
from diffusion.lora_file import (
    FluxShape,
    SD3Shape,
    load_lora,
    save_lora,
)

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries
FLUX_SHAPE = FluxShape(2, 2, 2, 16, 64, 24, 20)
SD3_SHAPE = SD3Shape(3, 2, 16, 24, 20, dual_attention=(0,))


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


def test_names_and_sizes_are_those_of_diffusers(flux, sd3):
    for model, shape in ((flux, FLUX_SHAPE), (sd3, SD3_SHAPE)):
        sizes = {n: (m.in_features, m.out_features) for n, m in linears(model).items()}
        assert shape.modules() == sizes


def compare(weights, model, bundle):
    errors = dict(weight_errors(weights, model, bundle))
    assert set(bundle.modules) <= errors.keys()
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize(
    ("chosen", "dora"),
    [("", False), ("blocks.", False), ("attn.to_q", False), ("blocks.", True)],
)
def test_flux_in_diffusers(chosen, dora, flux, tmp_path):
    names = [name for name in linears(flux) if chosen in name]
    bundle = drawn("flux", flux, names, dora=dora)
    path = save_lora(bundle, tmp_path / "a.safetensors", "diffusers")
    compare(merged_by_diffusers(flux, "flux", path), flux, bundle)


@pytest.mark.parametrize(
    "names", [["proj_out"], ["proj_out", "single_transformer_blocks.1.proj_out", "x_embedder"]]
)
def test_a_name_that_ends_others(names, flux, tmp_path):
    bundle = drawn("flux", flux, names)
    path = save_lora(bundle, tmp_path / "a.safetensors", "diffusers")
    compare(merged_by_diffusers(flux, "flux", path), flux, bundle)
    folder = save_lora(bundle, tmp_path / "folder", "peft")
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(flux), str(folder)).merge_and_unload()
    compare({n: m.weight for n, m in linears(merged).items()}, flux, bundle)


def test_sd3_in_diffusers(sd3, tmp_path):
    bundle = drawn("sd3", sd3, list(linears(sd3)))
    path = save_lora(bundle, tmp_path / "a.safetensors", "diffusers")
    compare(merged_by_diffusers(sd3, "sd3", path), sd3, bundle)


def test_kohya_in_diffusers(flux, tmp_path):
    names = [n for n in linears(flux) if n.startswith("transformer_blocks.")]
    bundle = drawn("flux", flux, names)
    path = save_lora(bundle, tmp_path / "a.safetensors", "kohya")
    compare(merged_by_diffusers(flux, "flux", path), flux, bundle)


@pytest.mark.parametrize("stabilized", [False, True])
def test_theirs_in_ours(stabilized, flux, tmp_path):
    model = copy.deepcopy(flux)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k", "proj_mlp", "norm.linear"],
        rank_pattern={"proj_mlp": 2}, alpha_pattern={"to_k": 3}, use_rslora=stabilized,
    )  # fmt: skip
    model.add_adapter(settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    diffusers.FluxPipeline.save_lora_weights(
        str(tmp_path),
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    bundle = load_lora(tmp_path / "pytorch_lora_weights.safetensors", FLUX_SHAPE.modules())
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(bundle.modules) == set(layers)
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(bundle.delta_weight(name), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "proj_mlp"]),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], use_rslora=True),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "norm.linear"], use_dora=True),
        peft.LoHaConfig(r=3, alpha=6, target_modules=["to_q", "proj_mlp"]),
        peft.LoKrConfig(r=2, alpha=6, target_modules=["to_q", "proj_mlp"]),
        peft.LoKrConfig(r=99, alpha=6, target_modules=["to_q", "proj_mlp"]),
        peft.LoKrConfig(r=2, alpha=6, target_modules=["to_q"], decompose_both=True),
        peft.LoHaConfig(r=3, alpha=6, target_modules=["to_q"], rank_pattern={"to_q": 2}),
    ],
    ids=lambda settings: f"{settings.peft_type.value} {settings.r}",
)
def test_folders_of_peft(settings, flux, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(flux), settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, generator=generator)
    model.save_pretrained(str(tmp_path))
    bundle = load_lora(tmp_path, FLUX_SHAPE.modules())
    merged = {n: m.weight for n, m in linears(model.merge_and_unload()).items()}
    changed = {n for n, m in linears(flux).items() if not torch.equal(merged[n], m.weight)}
    assert set(bundle.modules) == changed
    compare(merged, flux, bundle)
