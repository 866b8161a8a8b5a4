"""Attention modules of several families, and models that have none that fits."""

import inspect
import sys

import pytest
import torch
import transformers
from torch import nn

from core_gates import GatesError, MissingExtraError
from language import attach_block_gates, attach_output_gate, open_model
from language.hf.gate_file import fingerprint
from language.hf.locate import OLDEST, locate_attention

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "num_attention_heads": 4,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}


def meta(name, **settings):
    """Return a model without values, for its modules alone."""
    kind = getattr(transformers, f"{name}Config")
    config = kind(**(SIZES | {"pad_token_id": None, "eos_token_id": None} | settings))
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        ("Llama", {}, ("layers.1.self_attn", "q_proj", "o_proj", 4, 4, 8)),
        ("Qwen3", {"head_dim": 6}, ("layers.1.self_attn", "q_proj", "o_proj", 4, 32, 6)),
        ("Phi3", {"num_key_value_heads": 2}, ("layers.1.self_attn", "qkv_proj", "o_proj", 4, 2, 8)),
        ("GPT2", {}, ("h.1.attn", "c_attn", "c_proj", 4, 4, 8)),
        ("GPTNeo", {"attention_types": [[["global"], 2]], "num_heads": 4, "num_layers": 2},
         ("h.1.attn.attention", "q_proj", "out_proj", 4, 4, 8)),
        ("Falcon", {}, ("h.1.self_attention", "query_key_value", "dense", 4, 1, 8)),
        ("Bloom", {}, ("h.1.self_attention", "query_key_value", "dense", 4, 4, 8)),
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2},
         ("blocks.1.attn", "Wqkv", "out_proj", 4, 4, 8)),
        ("DeepseekV3", {**LATENT, "num_key_value_heads": 4, "v_head_dim": 6},
         ("layers.1.self_attn", "q_a_proj", "o_proj", 4, 4, 6)),
    ],
)  # fmt: skip
def test_projections_and_heads(name, settings, found):
    model = meta(name, **settings)
    places = locate_attention(model)
    _, last = places
    shown = (last.name, last.queries, last.projection)
    assert ((*shown, last.num_heads, last.num_kv_heads, last.head_dim), last.dim) == (found, 32)
    assert model.get_submodule(last.name) is last.module


def without(model, **changes):
    """Return a model whose first attention has other children."""
    attention = next(m for m in model.modules() if hasattr(m, "o_proj"))
    for name, child in changes.items():
        setattr(attention, name, child)
        if child is None:
            delattr(attention, name)
    return model


def test_other_models_are_refused(refuses, absent):
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32}
    mamba = {"num_hidden_layers": 1, "state_size": 4}
    refuses(
        GatesError,
        (r"BertModel \(bert\) is an encoder, exp", lambda: locate_attention(meta("Bert"))),
        (r"\(t5\) is an encoder and a decoder", lambda: locate_attention(meta("T5", d_kv=8))),
        (r"\(bart\) is an encoder and a decoder", lambda: locate_attention(meta("Bart", **heads))),
        (
            r"crossattention \(GPT2Attention\) is attention of an encoder",
            lambda: locate_attention(meta("GPT2", add_cross_attention=True)),
        ),
        (
            r"^layers.0.self_attn \(LlamaAttention\) has no output projection: looked for o_proj, "
            "out_proj, dense, c_proj, Wo, attention_out next to q_proj$",
            lambda: locate_attention(without(meta("Llama"), o_proj=None)),
        ),
        ("takes 30 features of 3 heads and q_proj takes None",
         lambda: locate_attention(
             without(meta("Llama"), o_proj=nn.Linear(30, 32), q_proj=nn.Identity(), num_heads=3))),
        ("MambaModel has no attention", lambda: locate_attention(meta("Mamba", **mamba))),
        (r"^layers.0.self_attn has 4 weights on the meta device \(q_proj.weight\), as acc.*: open",
         lambda: attach_output_gate(meta("Llama"))),
        ("^layers.0.self_attn has 4 weights on", lambda: attach_block_gates(meta("Llama"))),
        ("^LlamaModel has 20 weights on the meta device", lambda: fingerprint(meta("Llama"))),
        ("^Linear is not a model of transformers: open", lambda: locate_attention(nn.Linear(2, 2))),
    )  # fmt: skip
    absent("transformers")
    refuses(MissingExtraError, ("needs transformers", lambda: locate_attention(nn.Linear(2, 2))))


@pytest.mark.fault("46 A1")
def test_a_release_whose_models_ignore_our_cache_is_refused_by_name(tmp_path, monkeypatch, refuses):
    """Below it, a model that is given ``cache=`` forgets all tokens but those of the call."""
    model = meta("Llama")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.23.0")
    line = rf"^transformers 5\.23\.0 is too old, expected {OLDEST} or newer.*: pip install [^\n]*$"
    refuses(
        GatesError,
        (line, lambda: attach_block_gates(model)),
        (line, lambda: attach_output_gate(model)),
        (line, lambda: open_model(tmp_path)),
    )
    assert "cache" in inspect.signature(transformers.LlamaModel.forward).parameters
