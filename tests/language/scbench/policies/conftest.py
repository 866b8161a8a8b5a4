"""Tiny models with random weights, prompts, and one policy of each kind that fits them."""

import copy

import pytest
import torch
import transformers

from language.scbench.policies.base import cache_argument
from language.scbench.policies.registry import policy_of

SIZES = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2},
}
LATENT = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 3},
}
"""Of DeepseekV3: keys of 24 features, values of 16."""

GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
SMALL = {
    "streaming": {},
    "snapkv": {"window": 8},
    "pyramidkv": {"window": 8, "beta": 4},
    "h2o": {},
    "tova": {},
    "knorm": {},
    "keydiff": {},
    "quest": {"page": 8},
    "oracle": {"page": 8},
    "a-shape": {"keep": 0.5, "sinks": 4},
    "tri-shape": {"keep": 0.5, "sinks": 4, "last": 10},
}
"""Policies with ``keep``, and what fits prompts of 60 tokens."""


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


@pytest.fixture(scope="session")
def small():
    """``small("snapkv", **options)``: a policy whose options fit the tokens."""
    return lambda name, **options: policy_of(name, **(SMALL.get(name, {}) | options))


@pytest.fixture(scope="session")
def answers():
    """``answers(model, tokens, policy)``: logits (6, B, V) of what a model generates."""

    def generate(model, tokens, policy=None, **options):
        if policy is not None:
            model = copy.deepcopy(model)
            options[cache_argument(model)] = policy.make_cache(model)
        return torch.stack(model.generate(tokens, max_new_tokens=6, **GREEDY, **options).logits)

    return generate


@pytest.fixture(scope="session")
def masked():
    """``masked(model, tokens, visible)``: logits where layer i sees ``visible[i]`` (B, H, T, T)."""

    def read(model, tokens, visible):
        model = copy.deepcopy(model)
        model.set_attn_implementation("sdpa")
        for layer, mask in zip(model.model.layers, visible, strict=True):
            layer.self_attn.register_forward_pre_hook(
                lambda _module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}),
                with_kwargs=True,
            )
        return model(tokens, use_cache=False).logits

    return read


@pytest.fixture
def watch(monkeypatch):
    """``watch(policy, "prefill")``: what a method will have returned, by layer."""

    def start(policy, method):
        returned, call = {}, getattr(type(policy), method)

        def watched(self, layer, *tensors):
            returned[layer.index] = call(self, layer, *tensors)
            return returned[layer.index]

        monkeypatch.setattr(type(policy), method, watched)
        return returned

    return start
