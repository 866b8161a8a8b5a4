"""Training of output gates: what the state holds, what moves, and two ranks."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from language.gated import gate_training
from language.gated.attach import attach_output_gate, output_gates
from language.gated.gate_training import GatedModel, attach_loras
from language.hf.lora import sora_layers

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
}


def gated(train):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval().double()
    attach_output_gate(model, dtype=torch.float64)
    return model, GatedModel(model, train, 64)


def batch():
    return torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(1))


def trained(parallel, train):
    """Return the state after three steps."""
    model, module = gated(train)
    wrapped, tokens = parallel(module), parallel.share(batch())
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        logits = wrapped(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return {"trained": module.state_dict(), "whole": model.state_dict()}


def test_two_ranks_are_one(two_ranks):
    two_ranks(trained, "projections", tolerance=1e-10)


@pytest.mark.parametrize("train", ["gates", "projections", "all"])
def test_the_state_is_what_is_trained(train):
    model, module = gated(train)
    ours = {id(p) for gate in output_gates(model).values() for p in gate.parameters()}
    heads = {id(layer.self_attn.o_proj.weight) for layer in model.model.layers}
    whole = {id(p) for p in model.parameters()}
    wanted = {"gates": ours, "projections": ours | heads, "all": whole}[train]
    assert {id(p) for p in module.parameters()} == wanted
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    tokens = batch()
    with torch.no_grad():
        assert torch.equal(module(tokens), model(tokens).logits)


@pytest.mark.fault("46 A5")
@pytest.mark.parametrize("size", [0, 64, 100, 200, 700])
@pytest.mark.parametrize("train", ["gates", "projections", "all"])
def test_loras_have_about_the_size_of_gates(size, train):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    before, whole = model(batch()).logits, sum(p.numel() for p in model.parameters())
    module = GatedModel(attach_loras(model, size), train, 64)
    assert torch.equal(module(batch()), before)
    ranks = [layer.adapter.rank for layer in sora_layers(model).values()]
    assert sum(ranks) == max(1, round(size / 64))  # 32 inputs and 32 outputs
    assert max(ranks) - min(ranks) <= 1
    learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
    others = {"gates": 0, "projections": 2 * 32 * 32, "all": whole}[train]
    assert learned == 64 * sum(ranks) + others
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
    module(batch()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(module(batch()), before)


@pytest.mark.fault("46 A5")
@pytest.mark.parametrize(("scale", "left"), [(None, (0, 0.2)), (0.001, (0.8, 1))])
def test_the_control_learns_a_known_correction_of_the_output_projections(scale, left, monkeypatch):
    """A LoRA of rank 1 can be the correction, and is after 50 steps; of a tiny scale it is not."""
    if scale is not None:
        monkeypatch.setattr(gate_training, "SCALE", scale)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    corrected = copy.deepcopy(model).requires_grad_(False)
    for layer in corrected.model.layers:
        layer.self_attn.o_proj.weight += torch.outer(torch.randn(32), torch.randn(32)) / 8
    module = GatedModel(attach_loras(model, 2 * 64), "gates", 64)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
    wanted, gaps = corrected(batch()).logits, []
    for _ in range(50):
        optimizer.zero_grad()
        gap = F.mse_loss(module(batch()), wanted)
        gap.backward()
        optimizer.step()
        gaps.append(gap.item())
    assert left[0] <= gaps[-1] / gaps[0] <= left[1]


def test_the_rest_moves_with_the_parts():
    model, module = gated("gates")
    before = module(batch())
    module.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close(module(batch()), before.float(), rtol=1e-4, atol=1e-4)
