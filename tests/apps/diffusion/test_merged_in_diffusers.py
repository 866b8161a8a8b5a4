"""What ``gates diffusion merge`` writes, opened by diffusers and PEFT as they are."""

import copy

import pytest
import torch
from safetensors.torch import save_file

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries
WEIGHTS = (0.7, -1.5)


def unet():
    """A U-Net of Stable Diffusion 1.5 that is narrow."""
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=2,
        cross_attention_dim=768, attention_head_dim=2,
    )  # fmt: skip


def flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=1, joint_attention_dim=24, pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=1, joint_attention_dim=24, caption_projection_dim=16,
        pooled_projection_dim=20, out_channels=16,
    )  # fmt: skip


def layers_of(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n.removesuffix(".base_layer"): m for n, m in model.named_modules()
            if isinstance(m, kinds) and ".lora_" not in n}  # fmt: skip


def drawn(model, chosen, prefix, seed, *, kohya):
    """Random factors of the layers of a model, and the change of each, in float64."""
    generator, tensors, changes = torch.Generator().manual_seed(seed), {}, {}
    for number, (name, layer) in enumerate(layers_of(model).items()):
        if not any(word in name for word in chosen) or number % 3 == seed % 3:
            continue
        rank, (outputs, inputs, *kernel) = 1 + number % 4, layer.weight.shape
        down = torch.randn(rank, inputs, *kernel, generator=generator) / 4
        up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator) / 4
        key = prefix + (name.replace(".", "_") if kohya else name)
        ends = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
        tensors |= {f"{key}.{end}.weight": t for end, t in zip(ends, (down, up), strict=True)}
        scale = 1.0
        if kohya:
            tensors[f"{key}.alpha"], scale = torch.tensor(2.0), 2 / rank
        flat = up.flatten(1).double() @ down.flatten(1).double()
        changes[name] = scale * flat.reshape(layer.weight.shape)
    return tensors, changes


@pytest.fixture
def merged(gates):
    def run(model, chosen, prefix, *more, kohya):
        total = {}
        for seed, name in enumerate("ab"):
            tensors, changes = drawn(model, chosen, prefix, seed, kohya=kohya)
            save_file(tensors, f"{name}.safetensors")
            for layer, change in changes.items():
                total[layer] = total.get(layer, 0) + WEIGHTS[seed] * change
        words = ("--method", "weighted", "--weights", ",".join(map(str, WEIGHTS)))
        gates("merge", "a.safetensors", "b.safetensors", *words, "--output=out.safetensors", *more)
        return total

    return run


def compare(fused, model, total):
    after = layers_of(fused)
    for name, layer in layers_of(model).items():
        change = (after[name].weight - layer.weight).double()
        wanted = total.get(name, torch.zeros_like(change))
        assert (change - wanted).norm() <= 1e-5 * max(1, float(wanted.norm())), name


@pytest.mark.parametrize("kohya", [True, False])
def test_a_unet(kohya, merged):
    model = unet()
    chosen = ("attn", "proj_", "ff.", *(() if kohya else ("conv1", "downsamplers")))
    total = merged(model, chosen, "lora_unet_" if kohya else "unet.", kohya=kohya)
    pipeline, fused = diffusers.StableDiffusionPipeline, copy.deepcopy(model)
    state, alphas, metadata = pipeline.lora_state_dict(
        ".", weight_name="out.safetensors", use_safetensors=True, unet_config=model.config,
        return_lora_metadata=True,
    )  # fmt: skip
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=fused, metadata=metadata)
    fused.fuse_lora()
    compare(fused, model, total)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_transformers(family, merged):
    model, kind = {
        "flux": (flux(), diffusers.FluxPipeline),
        "sd3": (sd3(), diffusers.StableDiffusion3Pipeline),
    }[family]
    total = merged(model, ("transformer_blocks",), "transformer.", "--base", family, kohya=False)
    fused = copy.deepcopy(model)
    state, *rest = kind.lora_state_dict(
        ".", weight_name="out.safetensors", use_safetensors=True, return_lora_metadata=True
    )
    alphas = {"network_alphas": None} if family == "flux" else {}
    kind.load_lora_into_transformer(state, transformer=fused, metadata=rest[-1], **alphas)
    fused.fuse_lora()
    compare(fused, model, total)


def test_a_folder_of_peft(gates, merged):
    model = flux()
    total = merged(model, ("transformer_blocks",), "transformer.", kohya=False)
    gates("convert", "out.safetensors", "peft", "--to", "peft")
    gates(
        "merge", "peft", "a.safetensors", "--output", "sum", "--method", "weighted", "--weights=1,0"
    )
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), "sum").merge_and_unload()
    compare(loaded, model, total)
