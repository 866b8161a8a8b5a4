from functools import partial

import pytest
import torch

from core_gates import AttnGate, DecodeAttnGate
from core_gates.attention import rotate
from tests.core_gates import drawn

PREFILL = ["seer_prefill_Qavg_Kmaxminavg", "seer_prefill_Qmaxavg_Kavg_double"]


@pytest.fixture(params=PREFILL)
def prefill(request, vectors):
    """A gate with the weights of golden vectors, the vectors and their options."""
    golden, meta = vectors(request.param)
    gate = AttnGate(
        meta["num_q_heads"],
        meta["num_kv_heads"],
        meta["head_dim"],
        block_size=meta["block_size"],
        gate_dim=meta["gate_hidden"],
        pooling=meta["gate_type"],
        force_double=meta["force_double"],
        rope_theta=meta["theta"],
    )
    weights = {
        f"weight_{part}": golden[f"weight.mask_linear_{part}.weight"]
        for part in "qk"
        if f"weight.mask_linear_{part}.weight" in golden
    }
    gate.load_state_dict(weights)
    return gate, golden, meta


@pytest.fixture
def rotated():
    """``rotated(golden, meta)``: q, k and v in float64 as attention takes them, (B, H, L, D)."""

    def make(golden, meta):
        q, k, v = (golden[name].double() for name in ("q_nope", "k_nope", "v"))
        positions = torch.arange(q.shape[1]).unsqueeze(-1)
        q, k = (rotate(t, positions, meta["theta"]) for t in (q, k))
        return tuple(t.transpose(1, 2) for t in (q, k, v))

    return make


@pytest.fixture
def decode_gate(vectors):
    """A gate for decoding with the weights of golden vectors, the vectors and their options."""
    golden, meta = vectors("seer_decode_Qproj")
    gate = DecodeAttnGate(
        meta["num_q_heads"],
        meta["num_kv_heads"],
        meta["head_dim"],
        block_size=meta["block_size"],
        gate_dim=meta["gate_hidden"],
        reduction=meta["q_head_pooling"],
        k_pooling=meta["gate_type"],
        qk_norm=meta["use_qk_norm"],
        rope_theta=meta["theta"],
    )
    names = {
        "weight_q": "linear_q",
        "weight_k": "linear_k",
        "q_norm.weight": "qnorm",
        "k_norm.weight": "knorm",
    }
    gate.load_state_dict({k: golden[f"weight.attngate_{v}.weight"] for k, v in names.items()})
    return gate, golden, meta


@pytest.fixture
def tokens():
    """``tokens(length, heads)``: random queries or keys (batch, length, heads, dim)."""

    def make(length, heads, dim=6, batch=2, seed=0, dtype=torch.float64):
        return drawn.randn(batch, length, heads, dim, seed=seed, dtype=dtype)

    return make


@pytest.fixture
def filled():
    """``filled(gate)``: the gate with weights of the size of one."""
    return partial(drawn.filled, seed=9)
