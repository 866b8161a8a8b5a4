"""Adapters on a FLUX of diffusers: next to PEFT, saved, quantized, offloaded, without memory."""

from copy import deepcopy
from types import SimpleNamespace

import accelerate
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SD3Transformer2DModel,
)
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core_gates import GatesError
from diffusion import AutoLoraPipeline, GatedFusion
from diffusion.evaluation.parity import relative_error
from diffusion.fusion.protocol import linear_sizes
from diffusion.lora_file import SD3Shape, save_lora
from diffusion.models.embedded_base import transformer_of
from diffusion.models.flow_matching import velocity
from diffusion.models.pipelines import read_gguf
from diffusion.models.text_encoders import TextStates
from tests.diffusion.random_adapters import random_adapter


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformer_of("unit").eval().requires_grad_(False)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    text = TextStates(torch.randn(2, 5, 384), torch.randn(2, 384))
    return torch.randn(2, 12, 4, 4), torch.tensor([0.2, 0.9]), text


@pytest.fixture
def adapters(model):
    """Of three ranks; two change some layers only."""
    return {
        "a": random_adapter(model, 1),
        "b": random_adapter(model, 2, rank=3, where="attn"),
        "c": random_adapter(model, 3, rank=1, where="single_transformer_blocks"),
    }


@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.parametrize(
    "strengths",
    [{"a": 1, "b": 1, "c": 1}, {"a": 0.7, "b": 1, "c": -0.4}, {"a": 0.7}, {"b": 1}, {"c": -0.4}],
)
@torch.no_grad()
def test_neutral_gates_are_what_peft_adds_and_diffusers_fuses(
    strengths, model, inputs, adapters, tmp_path
):
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, transformer=deepcopy(model), **dict.fromkeys(parts))
    for name in strengths:
        path = save_lora(adapters[name], tmp_path / f"{name}.safetensors")
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=name)
    if len(strengths) > 1:
        pipe.set_adapters(list(strengths), list(strengths.values()))
    else:
        pipe.fuse_lora(components=["transformer"], lora_scale=next(iter(strengths.values())))
        pipe.unload_lora_weights()
    expected = velocity(pipe.transformer, *inputs)
    assert relative_error(expected, velocity(model, *inputs)) > 1e-2
    for mode in ("gated", "sum"):
        with GatedFusion(model, {n: adapters[n] for n in strengths}, mode=mode) as fusion:
            fusion.set_strengths(strengths)
            assert relative_error(velocity(model, *inputs), expected) <= 1e-5


@pytest.mark.fault("diffusion D7")
def test_a_model_with_adapters_of_peft_is_refused_by_their_name(model, adapters, one_line):
    own = deepcopy(model)
    fusion = GatedFusion(own, adapters)
    own.add_adapter(LoraConfig(r=2, target_modules=["proj_mlp"]))
    for refused in (lambda: GatedFusion(own, adapters), fusion.attach):
        message = one_line(GatesError, refused)
        assert "single_transformer_blocks.0.proj_mlp has adapters of PEFT: take them" in message
    auto = AutoLoraPipeline(SimpleNamespace(transformer=own), SimpleNamespace())
    assert "has adapters of PEFT" in one_line(GatesError, auto, "a fox")
    own.unload_lora()
    with fusion:
        assert fusion.attached


@pytest.mark.parametrize(
    "options", [{}, {"time": "film"}, {"factors": True, "switch": True}, {"mode": "sum"}]
)
@torch.no_grad()
def test_a_model_has_the_same_bits_on_disk_with_adapters_and_after_them(
    options, model, inputs, adapters, tmp_path
):
    def saved():
        model.save_pretrained(tmp_path)
        return (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()

    before, plain = saved(), velocity(model, *inputs)
    with GatedFusion(model, adapters, **options):
        assert saved() == before
        assert not torch.equal(velocity(model, *inputs), plain)
    assert saved() == before
    assert torch.equal(velocity(model, *inputs), plain)


class EightBits(nn.Linear):
    """A layer whose weight is stored in eight bits, with a scale per row."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), False)
        self.bias = layer.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.fixture(params=["gguf", "int8", "float8"])
@torch.no_grad()
def pair(request, model, write_gguf, tmp_path):
    """A quantized model, and one in float32 of the same weights."""
    base, exact = deepcopy(model), deepcopy(model)
    if request.param == "gguf":
        model.save_config(tmp_path)
        base = read_gguf(write_gguf(model, tmp_path / "m.gguf"), tmp_path, torch.float32)
    elif request.param == "float8":
        base.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, (inputs, _) in linear_sizes(model).items():
        if request.param == "int8":
            base.set_submodule(name, EightBits(base.get_submodule(name)))
        layer, target = base.get_submodule(name), exact.get_submodule(name)
        target.bias.copy_(layer(torch.zeros(inputs)))
        target.weight.copy_((layer(torch.eye(inputs)) - target.bias).T)
    return base.requires_grad_(False), exact


@torch.no_grad()
def test_neutral_gates_on_a_quantized_base_are_that_base_plus_adapters(pair, inputs, model):
    base, exact = pair
    assert linear_sizes(base) == linear_sizes(model)
    adapters = {"a": random_adapter(model, 1), "b": random_adapter(model, 2, rank=3)}
    before = velocity(base, *inputs)
    assert relative_error(before, velocity(exact, *inputs)) <= 1e-5
    assert (before - velocity(model, *inputs)).abs().max() > 1e-4
    for name in linear_sizes(model):
        changes = [b.delta_weight(name) for b in adapters.values() if name in b.modules]
        exact.get_submodule(name).weight += sum(changes)
    expected = velocity(exact, *inputs)
    for mode in ("gated", "sum"):
        with GatedFusion(base, adapters, mode=mode):
            found = velocity(base, *inputs)
        assert relative_error(found, expected) <= 1e-5
        assert (found - before).abs().max() > 1e-2
        assert torch.equal(velocity(base, *inputs), before)


@pytest.mark.parametrize(
    ("how", "first"),
    [("sequential", "offload")]  # accelerate names what it moves once, without adapters
    + [(how, first) for how in ("model", "group", "blocks") for first in ("adapters", "offload")],
)
@torch.no_grad()
def test_an_offloaded_model_takes_adapters(how, first, model, inputs):
    adapters = {"a": random_adapter(model, 1), "b": random_adapter(model, 2)}
    with GatedFusion(model, adapters, factors=True) as fusion:
        expected = velocity(model, *inputs)
    plain = velocity(model, *inputs)
    cpu = torch.device("cpu")

    def offload():
        if how == "model":
            accelerate.cpu_offload_with_hook(model, cpu)
        elif how == "sequential":
            accelerate.cpu_offload(model, cpu)
        else:
            level = {"offload_type": "leaf_level"}
            if how == "blocks":
                level = {"offload_type": "block_level", "num_blocks_per_group": 1}
            apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **level)

    if first == "offload":
        offload()
    fusion.attach()
    if first == "adapters":
        offload()
    assert_close(velocity(model, *inputs), expected)
    fusion.detach()
    assert_close(velocity(model, *inputs), plain)


class Largest(TorchDispatchMode):
    """Note the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = [one.numel() for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return found


@torch.no_grad()
def test_no_tensor_of_all_adapters_exists(model, inputs):
    """With eight adapters the largest tensor is no larger than one output of the model."""
    images = torch.randn(8, 12, 16, 16)
    text = TextStates(torch.randn(8, 5, 384), torch.randn(8, 384))
    with Largest() as plain:
        velocity(model, images, torch.rand(8), text)
    adapters = {f"a{k}": random_adapter(model, k) for k in range(8)}
    for mode in ("gated", "sum"):
        with GatedFusion(model, adapters, mode=mode), Largest() as fused:
            velocity(model, images, torch.rand(8), text)
        widest = max(sum(site.sizes) for site in GatedFusion(model, adapters).sites)
        tokens = 8 * (64 + 5)
        assert fused.numel <= max(plain.numel, tokens * widest)
        assert fused.numel < 2 * plain.numel
        assert fused.numel < 8 * tokens * 4 * 32 / 2


def test_a_tensor_of_all_adapters_would_be_seen():
    with Largest() as seen:
        torch.stack([torch.ones(10, 3)] * 8, -2).sum(-2)
    assert seen.numel == 240


def test_sizes_of_sd3_medium():
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192,
        )  # fmt: skip
    fused, sites = GatedFusion(model, {}, everywhere=True), SD3Shape().fused()
    found = {name.replace("___", "."): gate.dim for name, gate in fused.gates.items()}
    assert found == {site.name: sum(site.sizes) for site in sites}
    assert all(parameter.is_meta for parameter in fused.parameters())
    whole = 3 + 1 + 4 + 1 + 6  # of qkv, out, mlp and modulation, in widths, for each stream
    assert sum(found.values()) == 1536 * (24 * whole + 23 * whole + 3 + 2)
