"""Experts of the core inside mixture models of transformers, compared with its eager ones."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from core_gates.errors import GatesError, MissingExtraError
from language.hf.experts import register_experts, run_experts
from language.hf.locate import OLDEST

E, K, D, HIDDEN, VOCABULARY = 4, 2, 32, 24, 64
CHOICES = {"num_experts": E, "num_experts_per_tok": K}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
MODELS = {
    "Mixtral": {"num_local_experts": E, "num_experts_per_tok": K},
    "Qwen2Moe": {
        **CHOICES,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": HIDDEN,
    },
    "Qwen3Moe": {**CHOICES, "moe_intermediate_size": HIDDEN, "head_dim": 8},
    "Olmoe": CHOICES,
    "DeepseekV3": {
        **LATENT,
        **{"n_routed_experts": E, "num_experts_per_tok": K, "n_group": 2, "topk_group": 1},
        **{"moe_intermediate_size": HIDDEN, "first_k_dense_replace": 1, "num_key_value_heads": 4},
        "v_head_dim": 8,
    },
}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_experts()
    yield
    del ALL_EXPERTS_FUNCTIONS["gates"]


def config_of(name, **settings):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": HIDDEN}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    kind = getattr(transformers, f"{name}Config")
    return kind(**(sizes | ends | {"initializer_range": 0.1} | MODELS[name] | settings))


def model_of(name, how):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(name), experts_implementation=how)


def tokens():
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def experts_of(kind=MixtralExperts, **settings):
    """Return the experts of a layer, with random weights."""
    config = config_of("Mixtral", swiglu_limit=10.0, **settings)
    config._experts_implementation = "gates"
    torch.manual_seed(2)
    experts = kind(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def change(experts, name, value):
    """Give experts an attribute, also a function instead of a module."""
    if hasattr(experts, name):
        delattr(experts, name)
    setattr(experts, name, value)


def call(experts, how="gates", dtype=torch.float32):
    """Return the results of experts for random tokens, of which some choices are no expert."""
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(20, E + 1, generator=generator).argsort(1)[:, :K]
    x, weights = torch.randn(20, D, generator=generator), torch.rand(20, K, generator=generator)
    experts.config._experts_implementation = how
    return experts.to(dtype)(x.to(dtype), index, weights.to(dtype))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_eager_ones(name, dtype, bar, monkeypatch):
    calls = Mock(side_effect=run_experts)  # else transformers might compute its own twice
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "gates", calls)
    model, found = model_of(name, "eager").to(dtype), {}
    for how in ("eager", "gates"):
        assert not calls.called
        model.set_experts_implementation(how)
        model.zero_grad()
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[how] = out.logits.detach(), gradient
    assert model.config._experts_implementation == "gates"
    layers = sum("gate_up_proj" in module._parameters for module in model.modules())
    assert calls.call_count == layers > 0
    for ours, eager in zip(found["gates"], found["eager"], strict=True):
        assert (ours - eager).norm() <= bar * eager.norm()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_trained_and_saved_opens_with_eager(name, tmp_path):
    model = model_of(name, "gates")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.save_pretrained(tmp_path)
    assert "gates" not in (tmp_path / "config.json").read_text()
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    ours, theirs = (
        one.eval().generate(tokens()[:, :4], max_new_tokens=12, do_sample=False)
        for one in (model, eager)
    )
    assert ours.tolist() == theirs.tolist()
    assert len(ours[:, 4:].unique()) > 4


@pytest.mark.parametrize(
    "act",
    ["silu", "swish", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_new", "relu", "linear"],
)
def test_activations_and_choices_of_no_expert(act):
    experts = experts_of(hidden_act=act)
    eager = call(experts, "eager", torch.float64)
    assert eager.abs().mean() > 0.1
    assert_close(call(experts, dtype=torch.float64), eager, rtol=1e-12, atol=1e-12)


def test_an_activation_may_be_a_function():
    expected, experts = call(experts_of()), experts_of()
    change(experts, "act_fn", F.silu)
    assert torch.equal(call(experts), expected)


def test_compiled_in_one_graph():
    experts = experts_of()
    expected = call(experts, "eager")
    experts.forward = torch.compile(experts.forward, backend="eager", fullgraph=True)
    assert_close(call(experts), expected, rtol=1e-5, atol=1e-6)


def test_autocast_keeps_the_dtype_of_the_tokens():
    experts = experts_of()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(experts)
    assert found.dtype == torch.float32
    assert_close(found, call(experts, "eager"), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("is_transposed", True, "is_transposed=True"),
        ("is_concatenated", False, "is_concatenated=False"),
        ("has_bias", True, "has_bias=True"),
        ("has_gate", False, "has_gate=False"),
        ("has_post_expert_norm", True, "has_post_expert_norm=True"),
        ("act_fn", nn.Mish(), "act_fn=Mish"),
        ("act_fn", torch.tanh, "act_fn=tanh"),
    ],
)
def test_what_computes_something_else_is_refused(refuses, name, value, shown):
    experts = experts_of()
    change(experts, name, value)
    refuses(GatesError, (rf"^MixtralExperts has {shown}, but 'gates' .*$", lambda: call(experts)))


def test_another_gate_is_refused():
    with pytest.raises(GatesError, match=r"^DeepseekV4Experts has an _apply_gate that is not .*$"):
        call(experts_of(DeepseekV4Experts))


def test_transformers_is_there_and_new_enough(refuses, monkeypatch, absent):
    assert ALL_EXPERTS_FUNCTIONS["gates"] is run_experts
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="5.6.2"))
    with pytest.raises(GatesError, match=rf"^transformers 5\.6\.2 .* expected {OLDEST} or newer"):
        register_experts()
    absent("transformers")
    refuses(MissingExtraError, ("language needs transformers", lambda: register_experts()))
