"""Tiny models of transformers with random weights."""

import pytest
import torch
import transformers

GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 6},
    "Mistral": GROUPED,
    "Gemma2": {**GROUPED, "head_dim": 6, "tie_word_embeddings": False},
    "Phi3": GROUPED,
    "GPTNeoX": {},
    "GPT2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "Falcon": {"tie_word_embeddings": False},
    "Olmo": GROUPED,
    "Bloom": {},
}
SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "initializer_range": 0.3, "max_position_embeddings": 64},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
}


@pytest.fixture(scope="session")
def tiny():
    """``tiny("Llama", seed=0, **settings)``: a causal language model in evaluation mode."""

    def build(name, *, seed=0, **settings):
        kind = getattr(transformers, f"{name}Config")
        torch.manual_seed(seed)
        config = kind(**(SIZES | FAMILIES.get(name, {}) | settings))
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture(scope="session")
def tokens():
    """Two sequences (2, 9) without padding."""
    return torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
