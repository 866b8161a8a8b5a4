"""Tiny mixture models of transformers with random weights, saved as checkpoints."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from language.offload.loading import load_offloaded
from language.offload.setup import Setup

E, K, LAYERS, VOCABULARY = 6, 2, 3, 64
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24},
    **{"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"initializer_range": 0.2, "num_experts_per_tok": K},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
LATENT = {
    **{"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"q_lora_rank": 8, "num_key_value_heads": 4, "moe_intermediate_size": 24},
    **{"n_routed_experts": E, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}
MODELS = {
    "Mixtral": {"num_local_experts": E},
    "Qwen2Moe": {
        **{"num_experts": E, "moe_intermediate_size": 24},
        "shared_expert_intermediate_size": 24,
    },
    "Qwen3Moe": {"num_experts": E, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": E, "intermediate_size": 24},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "GptOss": {"num_local_experts": E, "head_dim": 8, "sliding_window": 8},
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint(name, dtype, fused)``: a folder, made once, of a model that is not trained."""
    made = {}

    def make(name="Qwen3Moe", dtype=torch.float32, fused=False):
        key = name, dtype, fused
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**(SIZES | MODELS[name]))
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.save_pretrained(folder, save_original_format=not fused, max_shard_size="60KB")
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def resident():
    """``resident(folder)``: the whole model, experts computed by transformers' eager loop.

    Its weights are copied: where shards are mapped at odd addresses, a product of matrices rounds
    otherwise than in aligned memory, in stock models as well.
    """

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, experts_implementation="eager", dtype="auto"
        )
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model.eval()

    return load


@pytest.fixture
def offloaded():
    """``offloaded(folder, **options)``: a model and its setup, closed after the test."""
    opened, fields = [], Setup.__dataclass_fields__.keys()

    def load(folder, **options):
        setup = Setup(**{name: options.pop(name) for name in fields & options.keys()})
        opened.append(load_offloaded(folder, setup=setup, **options))
        return opened[-1]

    yield load
    for model in opened:
        model.offload.close()
        assert not model.offload.transfers.thread.is_alive()
