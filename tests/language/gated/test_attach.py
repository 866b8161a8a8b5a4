"""Output gates on twelve families of models, compared with the models without them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from core_gates.monitor import GateMonitor
from language.gated.attach import OutputGate, attach_output_gate, detach_output_gate
from language.hf.locate import locate_attention

FAMILIES = (
    *("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3", "GPTNeoX", "GPT2", "OPT", "Falcon"),
    *("Olmo", "Bloom"),
)  # as in conftest.py
DAILY = ("Llama", "Gemma2", "GPT2", "Falcon", "Bloom")  # kinds of projections and of scores
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
HALF = {"bias_init": 0.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_open_gates_change_no_bit_and_half_open_ones_the_logits(name, tiny, tokens):
    model = tiny(name)
    bare, names = logits(model, tokens), list(model.state_dict())
    gates = attach_output_gate(model, bias_init=40.0)
    assert torch.equal(logits(model, tokens), bare)
    assert (len(gates), detach_output_gate(model)) == (2, gates)
    for granularity in ("headwise", "elementwise"):
        attach_output_gate(model, granularity=granularity, **HALF)
        half = logits(model, tokens)
        assert (half - bare).abs().max() > 0.05
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, tokens), half)
        for gate in detach_output_gate(twin).values():
            nn.init.zeros_(gate.weight)
        assert_close((logits(twin, tokens), logits(model, tokens)), (bare, half), rtol=0, atol=0)
        assert all(g._input is None for g in detach_output_gate(model).values())
    assert torch.equal(logits(model, tokens), bare)
    assert list(model.state_dict()) == names
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_cache_and_left_padding(name, tiny, tokens):
    model = tiny(name)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = model.generate(tokens[:, :6], **settings)
    for gate in attach_output_gate(model, **HALF).values():
        nn.init.normal_(gate.weight)
    cached = model.generate(tokens[:, :6], **settings)
    assert cached.tolist() != before.tolist()
    assert cached.tolist() == model.generate(tokens[:, :6], use_cache=False, **settings).tolist()
    prompts, mask = tokens[:, :6].clone(), torch.ones(2, 6, dtype=torch.long)
    prompts[1, :2] = mask[1, :2] = 0
    padded = model.generate(prompts, attention_mask=mask, **settings)
    assert padded[0].tolist() == cached[0].tolist()
    single = model.generate(prompts[1:, 2:], **settings)
    assert padded[1, 2:].tolist() == single[0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_gates_alone_have_gradients_with_checkpointing_as_well(name, tiny, tokens):
    model = tiny(name).requires_grad_(False)
    attach_output_gate(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 4
    assert all(".output_gate." in name for name in found[0])
    assert all(gradient.abs().max() > 1e-6 for gradient in found[0].values())
    assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize(
    "name",
    [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES],
)
def test_eager_sdpa_and_compiled_attention_agree(name, tiny, tokens):
    model = tiny(name, num_hidden_layers=1)
    attach_output_gate(model, **HALF)
    expected = logits(model, tokens)
    for attention in locate_attention(model):
        attention.module.compile(backend="eager", fullgraph=True)
    assert_close(logits(model, tokens), expected, **CLOSE)
    has_eager_alone = name in ("Bloom", "Gemma2")  # Gemma2 caps its scores
    assert (model.config._attn_implementation == "eager") == has_eager_alone
    if not has_eager_alone:
        torch._dynamo.reset()
        model.set_attn_implementation("eager")
        assert_close(logits(model, tokens), expected, **CLOSE)


def test_a_whole_model_is_one_graph_also_one_that_was_compiled_without_gates(tiny, tokens):
    model = tiny("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, tokens, use_cache=False)
    attach_output_gate(model, **HALF)
    found = logits(compiled, tokens, use_cache=False)
    assert_close(found, logits(model, tokens), **CLOSE)
    assert len(detach_output_gate(compiled)) == 1


@PEFT
@pytest.mark.parametrize("moment", ["before", "after"])
def test_lora_on_the_output_projection_is_gated(moment, tiny, tokens):
    model, gated = tiny("Llama"), tiny("Llama")
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"])
    attach_output_gate(gated, **HALF)
    if moment == "after":
        attach_output_gate(model, **HALF)
        logits(model, tokens)
    model = get_peft_model(model, settings)
    if moment == "before":
        attach_output_gate(model, **HALF)
    for ours, theirs in zip(locate_attention(model), locate_attention(gated), strict=True):
        ours.module.output_gate.load_state_dict(theirs.module.output_gate.state_dict())
        for name in ("q_proj", "o_proj"):
            layer = getattr(ours.module, name)
            nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            getattr(theirs.module, name).weight.data += 2 * update.detach()
    expected = logits(gated, tokens)
    assert_close(logits(model.eval(), tokens), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-4)
    assert len(detach_output_gate(merged)) == 2
    assert not any(m._forward_pre_hooks for m in merged.modules())


def test_options_reach_the_gates_and_the_monitor_sees_them(tiny, tokens):
    model = tiny("Llama").to(torch.bfloat16)
    options = {"sharing": "head_shared", "form": "additive", "activation": "tanh"}
    gates = attach_output_gate(model, bias_init=None, dtype=torch.float32, **options)
    gate = gates["layers.0.self_attn"]
    assert isinstance(gate, OutputGate)
    assert (gate.gate_shape, gate.bias, gate.weight.dtype) == ((1, 8), None, torch.float32)
    assert logits(model, tokens).dtype == torch.bfloat16
    detach_output_gate(model)
    attach_output_gate(model, bias_init=0.5)
    monitor = GateMonitor(model)
    logits(model, tokens)
    assert any("layers.1.self_attn.output_gate" in name for name in monitor.compute())


@PEFT
def test_what_does_not_fit_is_refused(tiny, tokens, refuses):
    gated = tiny("Llama")
    attach_output_gate(gated)
    own = tiny("Llama")
    own.model.layers[1].self_attn.add_module("output_gate", nn.Linear(2, 2))
    sliced = tiny("Bloom", pretraining_tp=2, slow_but_exact=True)
    attach_output_gate(sliced)
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["output_gate"])
    copied = get_peft_model(copy.deepcopy(gated), settings)
    refuses(
        GatesError,
        (
            "layers.0.self_attn has output gates already: call det",
            lambda: attach_output_gate(gated),
        ),
        (
            r"layers.1.self_attn \(LlamaAttention\) has an output_gate",
            lambda: attach_output_gate(own),
        ),
        ("LlamaForCausalLM has no output gates: call attach", lambda: detach_output_gate(own)),
        ("h.0.self_attention did not call dense, so that", lambda: logits(sliced, tokens)),
        ("was replaced by ModulesToSaveWrapper, which", lambda: logits(copied, tokens)),
    )
    assert all(gate._input is None for gate in detach_output_gate(sliced).values())
    bare = tiny("Llama")
    for wrong in (float("nan"), float("inf"), "a"):
        with pytest.raises(ValueError, match=r"^bias_init must be a finite number, got "):
            attach_output_gate(bare, bias_init=wrong)
