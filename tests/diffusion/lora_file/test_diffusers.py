"""Our files in the loaders of diffusers and PEFT, and theirs in ours."""

import copy

import pytest
import torch

from diffusion.lora_file import Factors, FluxShape, LoraBundle, SD3Shape, load_lora, save_lora

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries
FLUX_SHAPE = FluxShape(2, 2, 2, 16, 64, 24, 20)
SD3_SHAPE = SD3Shape(3, 2, 16, 24, 20, dual_attention=(0,))


@pytest.fixture(scope="module")
def flux():
    """A FLUX.1 of width 32 with every kind of layer."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


@pytest.fixture(scope="module")
def sd3():
    """An SD3 of width 32 with every kind of layer."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
        pooled_projection_dim=20, out_channels=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def drawn(family, model, names, *, dora=False):
    """A random adapter of some layers, of mixed ranks and scales."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for number, name in enumerate(names):
        outputs, inputs = linears(model)[name].weight.shape
        rank, scale = 1 + number % 4, (1.0, 0.5, 1 / 3, 2.0)[number // 3 % 4]
        magnitude = torch.rand(outputs, 1, generator=generator) + 1 if dora else None
        down = torch.randn(rank, inputs, generator=generator) / 4
        up = torch.randn(outputs, rank, generator=generator) / 4
        modules[name] = Factors(down, up, scale, magnitude)
    return LoraBundle(family, modules)


def merged_by_diffusers(model, family, path):
    """The weights of a copy of the model with a file merged by diffusers."""
    kinds = {"flux": diffusers.FluxPipeline, "sd3": diffusers.StableDiffusion3Pipeline}
    encoders = ("", "_2", "_3")[: 2 + (family == "sd3")]
    pipe = kinds[family](
        transformer=copy.deepcopy(model), vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **{f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in encoders},
    )  # fmt: skip
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    pipe.fuse_lora(components=["transformer"])
    merged = {n.removesuffix(".base_layer"): m for n, m in linears(pipe.transformer).items()}
    return {name: layer.weight for name, layer in merged.items() if ".lora_" not in name}


def test_names_and_sizes_are_those_of_diffusers(flux, sd3):
    for model, shape in ((flux, FLUX_SHAPE), (sd3, SD3_SHAPE)):
        sizes = {n: (m.in_features, m.out_features) for n, m in linears(model).items()}
        assert shape.modules() == sizes


def compare(weights, model, bundle):
    """Every change of a weight is the ΔW of the adapter, by its norm, or nothing."""
    norm, layers, wrong = torch.linalg.matrix_norm, linears(model), {}
    assert bundle.modules.keys() <= layers.keys()
    for name, layer in layers.items():
        change, expected = weights[name] - layer.weight, torch.zeros(())
        if name in bundle.modules:
            expected = bundle.delta_weight(name, layer.weight.detach())
        if not norm(change - expected) <= 1e-5 * norm(expected.expand_as(change)):
            wrong[name] = change
    assert wrong == {}


@pytest.mark.parametrize(
    ("chosen", "dora"),
    [("", False), ("blocks.", False), ("attn.to_q", False), ("blocks.", True)],
)
def test_flux_in_diffusers(chosen, dora, flux, tmp_path):
    bundle = drawn("flux", flux, [name for name in linears(flux) if chosen in name], dora=dora)
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
    bundle = drawn("flux", flux, [n for n in linears(flux) if n.startswith("transformer_blocks.")])
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
