"""Which tokens are dropped, compared with NVIDIA/kvpress and with what is published."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close

from language.scbench.policies.registry import policy_of

GOLDEN = Path(__file__).parents[3] / "golden" / "attention_sequence"
WINDOW = {"window": 8}
SEVEN = {
    "snapkv": ("snapkv", WINDOW),
    "streaming_llm": ("streaming", {"sinks": 4}),
    "knorm": ("knorm", {}),
    "tova": ("tova", {}),
    "h2o_observed": ("h2o", {}),
    "keydiff": ("keydiff", {}),
    "pyramidkv": ("pyramidkv", {**WINDOW, "beta": 4}),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "kv_policies_llama.npz") as arrays:
        vectors = {name: torch.from_numpy(arrays[name]) for name in arrays if name != "meta"}
        meta = json.loads(str(arrays["meta"]))
    meta["config"]["attn_implementation"] = "sdpa"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**meta["config"])).eval()
    weights = {k.removeprefix("model."): v for k, v in vectors.items() if k.startswith("model.")}
    model.load_state_dict(weights)
    return model.requires_grad_(False), vectors, meta


@pytest.mark.parametrize("theirs", SEVEN)
def test_seven_policies_of_kvpress(theirs, golden, monkeypatch):
    model, vectors, meta = golden
    name, options = SEVEN[theirs]
    policy, seen = policy_of(name, keep=1 - meta["compression_ratio"], **options), {}
    prefill = type(policy).prefill

    def watched(self, layer, *tensors):
        seen[layer.index] = self.scores(layer, *tensors), prefill(self, layer, *tensors)
        return seen[layer.index][1]

    monkeypatch.setattr(type(policy), "prefill", watched)
    cache = policy.make_cache(model)
    logits = model(vectors["input_ids"], cache=cache).logits
    assert_close(logits, vectors["logits"], rtol=1e-4, atol=1e-4)
    for layer, (scores, kept) in seen.items():
        assert_close(scores, vectors[f"{theirs}.score.{layer}"], rtol=0, atol=1e-5)
        assert torch.equal(kept[0], vectors[f"{theirs}.kept.{layer}"])
    assert sorted(seen) == [0, 1, 2]
    new = model(torch.tensor([[meta["next_token"]]]), cache=cache).logits
    assert cache.get_seq_length() == meta["next_position"] + 1
    assert_close(new, vectors[f"{theirs}.next_logits"], rtol=0, atol=1e-4)
