"""Rotation by given frequencies, as models of transformers with scaled positions need it."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention import AttnGate, DecodeAttnGate, rotary_table, rotate
from core_gates.attention.seer.gate import pool_blocks, project_heads

EXACT = {"rtol": 0, "atol": 1e-6}
D = 16
SCALED = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers", minversion="5.0")
    from transformers.models.llama import modeling_llama

    return modeling_llama


@pytest.fixture(params=SCALED)
def turned(request, llama):
    """``turned(x, positions)``: tokens (B, T, H, D) as a model turns them; its frequencies."""
    config = llama.LlamaConfig(
        hidden_size=4 * D,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": request.param,
            "rope_theta": 10000.0,
            **SCALED[request.param],
        },
    )
    rotary = llama.LlamaRotaryEmbedding(config)

    def turn(x, positions):
        cos, sin = (part / rotary.attention_scaling for part in rotary(x, positions[None]))
        return llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

    plain = 10000.0 ** -(torch.arange(0, D, 2) / D)
    assert (rotary.inv_freq - plain).abs().max() > 1e-3
    return turn, rotary.inv_freq


def test_scaled_positions_are_those_of_the_model(turned):
    turn, frequencies = turned
    x, positions = draw(2, 40, 4, D), torch.arange(460, 500)
    found = rotate(x, positions.unsqueeze(-1), frequencies=frequencies)
    assert_close(found, turn(x, positions), **EXACT)
    assert (found - rotate(x, positions.unsqueeze(-1))).abs().max() > 0.1


def test_gates_rotate_as_the_model(turned):
    turn, frequencies = turned
    options = {"block_size": 4, "gate_dim": D, "frequencies": frequencies}
    q, k = draw(2, 60, 4, D), draw(2, 60, 4, D, seed=1)
    gate = AttnGate(4, 4, D, force_double=True, **options)
    starts = torch.arange(15) * 4
    queries = turn(project_heads(pool_blocks(q, 4, ("avg",)), gate.weight_q), starts)
    pooled = pool_blocks(k, 4, ("max", "min", "avg"))
    expected = torch.einsum(
        "bihd,bjhd->bhij", queries, turn(project_heads(pooled, gate.weight_k), starts)
    )
    past = torch.ones(15, 15, dtype=torch.bool).tril()
    assert_close(gate(q, k)[..., past], expected[..., past] / D**0.5, **EXACT)
    decode = DecodeAttnGate(4, 4, D, qk_norm=False, reduction="Qavg", **options)
    keys = turn(project_heads(pooled, decode.weight_k), starts)
    assert_close(decode.compress(k).blocks, keys, **EXACT)
    expected = torch.einsum("bihd,bjhd->bhij", turn(q, torch.arange(60)), keys) / D**0.5
    complete = starts + 4 <= torch.arange(1, 61).unsqueeze(-1)
    assert_close(decode(q, k)[..., complete], expected[..., complete], **EXACT)


@pytest.mark.parametrize("gate_class", [AttnGate, DecodeAttnGate])
def test_frequencies_take_the_place_of_a_base(gate_class):
    frequencies = 500.0 ** -(torch.arange(0, D, 2) / D)
    q, k = draw(1, 40, 4, D), draw(1, 40, 2, D, seed=1)
    torch.manual_seed(0)
    gate = gate_class(4, 2, D, block_size=4, gate_dim=D, rope_theta=500.0)
    given = gate_class(4, 2, D, block_size=4, gate_dim=D, frequencies=frequencies)
    given.load_state_dict(gate.state_dict())  # which holds no frequencies
    assert torch.equal(given(q, k), gate(q, k))
    assert torch.equal(given.bfloat16().float()(q, k), gate.bfloat16().float()(q, k))
    listed = gate_class(4, 2, D, gate_dim=D, frequencies=frequencies.tolist(), device="meta")
    assert listed.frequencies == given.frequencies
    assert torch.equal(torch.compile(given, backend="eager", fullgraph=True)(q, k), given(q, k))


def test_other_numbers_of_frequencies_are_refused(refuses):
    refuses(
        ValueError,
        (
            r"frequencies \(4,\) must be \(8,\), one per pair of 16 features",
            lambda: rotate(draw(3, D), torch.arange(3), frequencies=torch.ones(4)),
        ),
        (
            r"frequencies \(1, 8\) must be \(8,\)",
            lambda: rotary_table(torch.arange(3), D, frequencies=torch.ones(1, 8)),
        ),
        (
            r"frequencies \(8,\) must be \(64,\)",
            lambda: AttnGate(4, 2, D, frequencies=torch.ones(8)),
        ),
        (
            r"frequencies \(8,\) must be \(64,\)",
            lambda: DecodeAttnGate(4, 2, D, frequencies=[1.0] * 8),
        ),
    )
