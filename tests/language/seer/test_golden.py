"""Golden vectors of SeerAttention, given to a block gate as a model of transformers gives them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.head_gate import rotary_table, rotate_by
from core_gates.attention.seer.decode import BlockSelector, DecodeAttnGate
from core_gates.attention.seer.gate import AttnGate
from language.seer.attach import BlockGate
from language.seer.attention import AttentionInputs
from language.seer.cache import BlockCache

GOLDEN = Path(__file__).parents[2] / "golden" / "attention_sequence"
OUT = "sparse_out_thr0.1"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def read(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        values = {n: torch.from_numpy(arrays[n]) for n in arrays if n != "meta"}
        return values, json.loads(str(arrays["meta"]))


def block_gate(gate, weights):
    gate.load_state_dict(weights)
    attention = SimpleNamespace(name="attention", module=SimpleNamespace(layer_idx=0))
    return BlockGate(attention, gate, first=True, former="sdpa")


def seen(q, k, v, theta):
    """Rotate queries and keys, of which the former are the last tokens, as attention gets them."""
    table = tuple(part[None] for part in rotary_table(torch.arange(k.shape[1]), 16, theta))
    queries = tuple(part[:, -q.shape[1] :] for part in table)
    q, k = (rotate_by(x, tuple(part[..., None, :] for part in one))
            for x, one in ((q, queries), (k, table)))  # fmt: skip
    return AttentionInputs(*(x.transpose(1, 2) for x in (q, k, v)), 16**-0.5, None, queries), table


@pytest.mark.parametrize("name", ["Qavg_Kmaxminavg", "Qmaxavg_Kavg_double"])
def test_sparse_attention_of_a_prompt(name):
    golden, meta = read(f"seer_prefill_{name}")
    gate = AttnGate(
        *(meta[n] for n in ("num_q_heads", "num_kv_heads", "head_dim")),
        block_size=meta["block_size"], gate_dim=meta["gate_hidden"], pooling=meta["gate_type"],
        force_double=meta["force_double"], rope_theta=meta["theta"],
    )  # fmt: skip
    weights = {
        n: golden.get(f"weight.mask_linear_{n[-1]}.weight") for n in ("weight_q", "weight_k")
    }
    own = block_gate(gate, {n: weight for n, weight in weights.items() if weight is not None})
    own.selector = BlockSelector(threshold=0.1)
    prompt, _ = seen(*(golden[n] for n in ("q_nope", "k_nope", "v")), meta["theta"])
    assert_close(own.gate(*prompt.raw()), golden["gate_logits"], **CLOSE)
    wanted = next(golden[n] for n in (f"{OUT}_plus_diag", OUT) if n in golden)
    assert_close(own(prompt), wanted.float(), **CLOSE)


def test_scores_of_a_token_that_is_decoded():
    golden, meta = read("seer_decode_Qproj")
    gate = DecodeAttnGate(
        *(meta[n] for n in ("num_q_heads", "num_kv_heads", "head_dim")),
        block_size=meta["block_size"], gate_dim=meta["gate_hidden"], rope_theta=meta["theta"],
    )  # fmt: skip
    names = {"weight_q": "linear_q", "weight_k": "linear_k"}
    names |= {"q_norm.weight": "qnorm", "k_norm.weight": "knorm"}
    own = block_gate(gate, {n: golden[f"weight.attngate_{of}.weight"] for n, of in names.items()})
    keys = torch.cat([golden["k_nope"], golden["k_new_nope"]], 1)
    token, table = seen(golden["q_nope"], keys, keys, meta["theta"])
    cache = BlockCache(1, meta["block_size"])
    cache.turn(tuple(part[0] for part in table), len(keys))
    found = cache.layers[0].keys_for(gate, token, cache.table)
    assert_close(found.blocks, golden["k_compressed_complete_blocks"], **CLOSE)
    logits = own.gate.decode(token.raw()[0], found)
    assert_close(logits.softmax(-1)[:, :, 0], golden["scores"], **CLOSE)
    budget = meta["budget_blocks"] * meta["block_size"]
    chosen = BlockSelector(token_budget=budget, block_size=meta["block_size"])(logits)[:, :, 0]
    assert torch.equal(chosen, golden["mask_budget"])
