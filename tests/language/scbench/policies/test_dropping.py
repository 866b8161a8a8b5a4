"""Which tokens are dropped, compared with NVIDIA/kvpress and with what is published."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from core_gates.errors import GatesError
from language.scbench.policies.base import DroppingPolicy
from language.scbench.policies.cache import LayerState
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
def test_seven_policies_of_kvpress(theirs, golden, watch):
    model, vectors, meta = golden
    name, options = SEVEN[theirs]
    policy = policy_of(name, keep=1 - meta["compression_ratio"], **options)
    scores, kept = watch(policy, "scores"), watch(policy, "prefill")
    cache = policy.make_cache(model)
    logits = model(vectors["input_ids"], cache=cache).logits
    assert_close(logits, vectors["logits"], rtol=1e-4, atol=1e-4)
    for layer in range(3):
        assert_close(scores[layer], vectors[f"{theirs}.score.{layer}"], rtol=0, atol=1e-5)
        assert torch.equal(kept[layer][0], vectors[f"{theirs}.kept.{layer}"])
    new = model(torch.tensor([[meta["next_token"]]]), cache=cache).logits
    assert cache.get_seq_length() == meta["next_position"] + 1
    assert_close(new, vectors[f"{theirs}.next_logits"], rtol=0, atol=1e-4)


def state(heads=4, key_heads=2, length=300, index=0, layers=3, seed=0):
    """Return a layer, and random queries, keys and values (2, heads, length, 8)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, n, length, 8) for n in (heads, key_heads, key_heads))
    layer = LayerState(None, index, layers, 0.6)
    return layer, *(torch.randn(shape, generator=generator) for shape in shapes)


def maps(q, k):
    """Return the attention (B, H, T, T) of all tokens."""
    length, group = k.shape[2], q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * 0.6
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


def test_h2o_in_parts_is_the_sum_of_the_map():
    layer, q, k, v = state()
    total = maps(q, k).sum(2).unflatten(1, (2, 2)).mean(2)
    assert_close(
        policy_of("h2o").scores(layer, q, k, v),
        total / torch.arange(300, 0, -1),
        rtol=1e-5,
        atol=1e-6,
    )
    published = policy_of("h2o", keep=0.2, variant="published")
    kept, best = published.prefill(layer, q, k, v), total[..., :270].topk(30).indices.sort().values
    assert torch.equal(kept[..., :30], best)
    assert torch.equal(kept[..., 30:], torch.arange(270, 300).expand(2, 2, -1))


def test_published_snapkv_chooses_for_every_query_head():
    layer, q, k, v = state()
    votes = maps(q, k)[:, :, -32:, :-32].sum(2)
    pooled = torch.nn.functional.avg_pool1d(votes, 5, 1, 2)
    kept = policy_of("snapkv", keep=0.3, variant="published").prefill(layer, q, k, v)
    assert kept.shape == (2, 4, 90)
    assert torch.equal(kept[..., :58], pooled.topk(58).indices.sort().values)
    layer.extend(k, v)
    layer.keep(kept)
    assert layer.held["keys"].shape == (2, 4, 90, 8)
    keys, values = layer.extend(k[:, :, :1], v[:, :, :1])
    assert keys.shape == (2, 4, 91, 8)
    assert torch.equal(values[:, 1, -1], v[:, 0, 0])
    assert torch.equal(values[1, 2, :90], v[1, 1, kept[1, 2]])


@pytest.mark.parametrize(
    ("variant", "keep", "budgets"),
    [
        ("kvpress", 0.4, [1560, 800, 40]),  # 800 / 20 in the last layer, the rest of 2 * 800
        ("kvpress", 0.1, [200, 200, 200]),  # 200 / 20 were less than the window
        ("published", 1 - 0.54, [32 + 1732, 32 + 888, 32 + 44]),  # 0.46 but for rounding
        ("published", 0.8, [1600, 1600, 1600]),  # a prompt shorter than twice what is kept
    ],
)
def test_budgets_of_pyramids(variant, keep, budgets):
    policy = policy_of("pyramidkv", keep=keep, variant=variant)
    assert [policy.count(LayerState(None, i, 3, 1.0), 2000) for i in range(3)] == budgets


def test_published_knorm_keeps_the_first_layers():
    policy = policy_of("knorm", variant="published")
    for index, held in ((0, 300), (1, 300), (2, 150)):
        layer, *tensors = state(index=index)
        kept = policy.prefill(layer, *tensors)
        assert (300 if kept is None else kept.shape[-1]) == held


def test_chance_keeps_blocks_which_a_prompt_decides():
    policy = policy_of("chance", keep=0.5)
    layer, *tensors = state(heads=2, key_heads=2, length=320)
    kept = policy.prefill(layer, *tensors)
    assert torch.equal(kept, policy.prefill(layer, *tensors))
    assert (kept[0].unflatten(-1, (10, 16)).diff(dim=-1) == 1).all()
    assert not torch.equal(kept[0, 0], kept[0, 1])
    tensors[1] = tensors[1] + 1
    assert not torch.equal(kept, policy.prefill(layer, *tensors))


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(
                    self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize
                )
        return out


@pytest.mark.parametrize(
    "name", ["streaming", "snapkv", "pyramidkv", "h2o", "tova", "knorm", "keydiff"]
)
def test_no_map_of_all_pairs(name):
    layer, *tensors = state(heads=2, key_heads=1, length=1500)
    with Largest() as largest:
        policy_of(name).prefill(layer, *tensors)
    assert largest.elements < 0.4 * 2 * 2 * 1500**2


@dataclass(frozen=True)
class LoudPolicy(DroppingPolicy):
    """Keeps the tokens with the longest values."""

    name: ClassVar[str] = "loud"

    def scores(self, layer, queries, keys, values):
        return values.norm(dim=-1)


def test_a_policy_in_ten_lines(tiny, tokens):
    model, policy = tiny(), LoudPolicy(keep=0.25)
    cache = policy.make_cache(model)
    out = model.generate(tokens, max_new_tokens=5, do_sample=False, cache=cache)
    assert out.shape == (2, 75)
    assert cache.get_seq_length() == 74
    assert cache.layers[0].states[0].held["keys"].shape[2] == 17 + 4


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores[..., :-1],
        lambda scores: scores.repeat(1, 4, 1),
        lambda scores: scores[:, 0],
        lambda scores: scores.where(scores < scores.amax(), torch.nan),
        lambda scores: None,
    ],
)
def test_scores_of_another_shape_are_refused_in_one_line(change, tiny, tokens, monkeypatch):
    model, policy = tiny(), LoudPolicy(keep=0.25)
    scores = LoudPolicy.scores
    monkeypatch.setattr(LoudPolicy, "scores", lambda *args: change(scores(*args)))
    with pytest.raises(GatesError, match=r"scores of LoudPolicy have NaN, or not the shape \(2, "):
        model(tokens, cache=policy.make_cache(model))
