"""A tiny Llama with random weights, and two prompts."""

import pytest
import torch
import transformers

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3},
}


@pytest.fixture(scope="session")
def tiny():
    """``tiny("Llama", **settings)``: a causal language model in evaluation mode, frozen."""

    def build(name="Llama", **settings):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**(SIZES | settings))
        model = transformers.AutoModelForCausalLM.from_config(config)
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def tokens():
    """Two sequences (2, 70)."""
    return torch.randint(1, 64, (2, 70), generator=torch.Generator().manual_seed(1))
