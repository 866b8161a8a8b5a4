"""Attention by rows next to maps of eager attention, the memory that it takes, and gates."""

import math

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from language.gated.attach import attach_output_gate
from language.gated.diagnostics import attention_diagnostics, attention_rows

FAMILIES = ["Llama", "Qwen3", "Mistral", "Gemma2", "Phi3", "GPTNeoX", "GPT2", "OPT", "Olmo"]
WINDOWS = {
    "Mistral": {"sliding_window": 7},
    "Gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 3},
}


@pytest.fixture
def sequence():
    return torch.randint(1, 64, (40,), generator=torch.Generator().manual_seed(2))


def of_maps(model, tokens):
    """Return the figures by the maps of eager attention and the states that it returns."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(tokens.unsqueeze(0), output_attentions=True, output_hidden_states=True)
    maps = torch.cat(found.attentions).double()  # (layers, H, T, T)
    entropy = -(maps * maps.clamp(min=1e-300).log()).sum(-1)
    return {
        "first_token_attention": maps[:, :, 1:, 0].mean((1, 2)),
        "with_row_0": maps[..., 0].mean((1, 2)),
        "row_entropy": entropy[..., 1:].mean((1, 2)),
        "largest_activation": torch.stack(found.hidden_states[1:-1]).abs().amax((1, 2, 3)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_eager_maps(family, tiny, sequence):
    model = tiny(family, **WINDOWS.get(family, {}))
    before = model.config._attn_implementation
    found = attention_diagnostics(model, sequence).figures
    assert model.config._attn_implementation == before
    for name, expected in of_maps(model, sequence).items():
        ours = torch.from_numpy(found[name])[: len(expected)]  # the last state is normed
        assert_close(ours, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 2.0}])
def test_no_map_of_all_tokens_is_made(options, largest):
    length, generator = 1024, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 4, generator=generator) for heads in (4, 2, 2))
    with largest() as made:
        attention_rows(q, k, v, **options)
    assert made.elements <= length**2 / 4  # 4 heads of 64 rows


def test_a_model_makes_no_map_either(tiny, largest):
    model = tiny("Llama", max_position_embeddings=1024)
    tokens = torch.randint(1, 64, (1024,), generator=torch.Generator().manual_seed(2))
    with largest() as made:
        attention_diagnostics(model, tokens)
    assert made.elements < len(tokens) ** 2


def test_gates_are_measured_by_layer(tiny, sequence):
    model = tiny("Llama")
    assert attention_diagnostics(model, sequence).histograms is None
    gates = attach_output_gate(model, granularity="headwise", bias_init=3.0)
    first, second = gates.values()
    with torch.no_grad():
        first.bias.fill_(-3.0)
        for gate in (first, second):
            gate.weight.zero_()
    found = attention_diagnostics(model, sequence)
    shut = 1 / (1 + math.exp(3))
    assert found.figures["gate_mean"] == pytest.approx([shut, 1 - shut], abs=1e-6)
    assert found.figures["gate_below_0.1"] == pytest.approx([1, 0])
    assert found.histograms.sum(1) == pytest.approx([4 * 40, 4 * 40])
    assert found.histograms[0, 0] == found.histograms[1, -1] == 4 * 40


def test_attention_that_computes_something_else_is_refused(tiny, sequence, refuses):
    bloom, oss = tiny("Bloom"), sinks(tiny)
    refuses(
        GatesError,
        ("BloomForCausalLM cannot be replaced", lambda: attention_diagnostics(bloom, sequence)),
        ("GptOssForCausalLM adds what is .*sinks", lambda: attention_diagnostics(oss, sequence)),
    )


def sinks(tiny):
    return tiny(
        "GptOss", num_local_experts=2, num_experts_per_tok=1, head_dim=8, num_key_value_heads=2
    )
