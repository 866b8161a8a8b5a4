"""A cache that keeps everything is that of transformers, and one that drops tokens hides them."""

import copy

import pytest
import torch
import transformers
from torch.testing import assert_close

from core_gates.errors import GatesError
from language.scbench.policies.base import cache_argument
from language.scbench.policies.registry import POLICIES, policy_of
from tests.language.scbench.policies.conftest import GREEDY, LATENT

DROPPING = ("streaming", "snapkv", "pyramidkv", "h2o", "tova", "knorm", "keydiff")
PUBLISHED = ("snapkv", "pyramidkv", "h2o", "knorm")
CASES = [
    *[(name, {}) for name in (*DROPPING, "quest", "oracle", "a-shape", "tri-shape", "full")],
    *[(name, {"variant": "published"}) for name in PUBLISHED],
    ("kivi", {"bits": 4, "group": 8, "residual": 16}),
]
ALL_FULL = {"layer_types": ["full_attention"] * 3}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def padded(tokens, padding):
    """Hide the first tokens of row 0, and return the mask."""
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return mask


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"kivi", "seer"}))
def test_everything_kept_is_plain_transformers_to_the_bit(
    name, padding, tiny, tokens, small, answers
):
    model, mask = tiny(), padded(tokens, padding)
    policy = small(name, **({} if name == "full" else {"keep": 1}))
    plain = answers(model, tokens, attention_mask=mask)
    assert torch.equal(answers(model, tokens, policy, attention_mask=mask), plain)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_batch_padded_on_the_left_is_its_prompts_one_by_one(
    name, options, tiny, tokens, small, answers
):
    model, policy, mask = tiny(), small(name, **options), padded(tokens, 9)
    both = answers(model, tokens, policy, attention_mask=mask)
    for row, first in ((0, 9), (1, 0)):
        single = answers(model, tokens[row : row + 1, first:], policy)
        assert_close(both[:, row : row + 1], single, **CLOSE)


@pytest.mark.parametrize(
    ("name", "options"),
    [*[(name, {}) for name in DROPPING], *[(name, {"variant": "published"}) for name in PUBLISHED]],
)
def test_dropped_tokens_are_those_of_a_mask(name, options, tiny, tokens, small, masked, watch):
    model, policy, length = tiny().double(), small(name, **options), 60
    kept = watch(policy, "prefill")
    cache = policy.make_cache(model)
    model(tokens[:, :length], cache=cache)
    new = torch.cat(
        [model(tokens[:, part], cache=cache).logits for part in (slice(60, 66), slice(66, 70))], 1
    )
    causal = torch.ones(70, 70, dtype=torch.bool).tril()
    visible = []
    for index in range(3):
        seen = causal.expand(2, 4, 70, 70).clone()
        if kept[index] is not None:
            columns = torch.zeros(2, kept[index].shape[1], length, dtype=torch.bool)
            columns.scatter_(-1, kept[index], True)
            seen[:, :, length:, :length] &= columns.repeat_interleave(4 // columns.shape[1], 1)[
                :, :, None
            ]
        visible.append(seen)
    assert (
        masked(model, tokens, [causal.expand(2, 4, -1, -1)] * 3)[:, 60:] - new
    ).abs().max() > 1e-3
    assert_close(new, masked(model, tokens, visible)[:, 60:], rtol=0, atol=1e-6)
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_copy_restores_the_context(name, options, tiny, tokens, small):
    model, policy = tiny(), small(name, **options)
    cache = policy.make_cache(model)
    model(tokens[:, :60], cache=cache)
    held, before = policy.cache_bytes(cache), [tensor.clone() for tensor in cache.tensors]

    def ask(part):
        own = copy.deepcopy(cache)
        model(tokens[:, part], cache=own)
        return model(tokens[:, :1], cache=own).logits

    first = ask(slice(60, 64))
    ask(slice(64, 70))
    assert torch.equal(ask(slice(60, 64)), first)
    assert policy.cache_bytes(cache) == held
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors, before, strict=True))
    assert cache.get_seq_length() == 60
    assert (cache.seconds > 0) == (name != "full")


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("name", ["snapkv", "quest", "kivi", "full"])
def test_rows_follow_beams(name, padding, tiny, tokens, small):
    options = {"group": 8, "residual": 16} if name == "kivi" else {}
    model, policy, mask = tiny(), small(name, **options), padded(tokens, padding)
    cache = policy.make_cache(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(tokens, cache=cache, attention_mask=mask, position_ids=positions)

    def then(cache, mask):
        new, mask = torch.full((len(mask), 1), 7), torch.cat([mask, mask[:, -1:]], 1)
        at = mask.sum(1, keepdim=True) - 1
        return model(new, cache=cache, attention_mask=mask, position_ids=at).logits

    logits = then(copy.deepcopy(cache), mask)
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert_close(then(swapped, mask.flip(0)), logits.flip(0), **CLOSE)
    cache.batch_repeat_interleave(2)
    assert_close(then(cache, mask.repeat_interleave(2, 0)), logits.repeat_interleave(2, 0), **CLOSE)


@pytest.mark.parametrize("family", ["Qwen3", "Phi3", "GPT2", "GPTNeoX"])
def test_other_families(family, tiny, tokens, small, answers):
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 3} if family == "GPT2" else {}
    model = tiny(family, **sizes)
    plain = answers(model, tokens)
    assert torch.equal(answers(model, tokens, policy_of("full")), plain)
    own = answers(model, tokens, small("snapkv"))
    assert torch.equal(own[0], plain[0])
    assert (own - plain)[1].abs().max() > 1e-4


def test_bytes_and_reads_of_what_is_kept(tiny, tokens, small):
    model = tiny()
    token = 3 * 2 * 2 * 2 * 16 * 4  # layers, keys and values, batch, key heads, features, bytes
    for name, keep in (("streaming", 0.5), ("snapkv", 0.3), ("quest", 0.5)):
        policy = small(name, keep=keep)
        cache = policy.make_cache(model)
        model(tokens[:, :64], cache=cache)
        held = int(64 * (1 if name == "quest" else keep))
        assert policy.cache_bytes(cache) == held * token
        assert cache.read is None
        model(tokens[:, 64:69], cache=cache)
        assert cache.read is None
        model(tokens[:, 69:], cache=cache)
        read = 4 * 8 + 6 - 8 if name == "quest" else held + 6  # of 9 pages 4, of the last 6 tokens
        assert cache.read == pytest.approx(read / 70)


def test_bytes_of_full_where_values_are_narrower_than_keys(tiny, tokens, small):
    model = tiny("DeepseekV3", **LATENT)
    for name, keep in (("full", 1), ("snapkv", 0.5), ("quest", 1)):
        policy = small(name, **({} if name == "full" else {"keep": keep}))
        cache = policy.make_cache(model)
        model(tokens, cache=cache)
        assert cache.full_bytes == 3 * 2 * 4 * 70 * (24 + 16) * 4
        assert policy.cache_bytes(cache) == keep * cache.full_bytes


@pytest.mark.parametrize("size", [16, 69, 70])
def test_parts_of_a_prompt_are_not_taken_for_it(size, tiny, tokens, small, answers):
    model = tiny()
    for name in ("snapkv", "streaming", "a-shape", "quest"):
        with pytest.raises(GatesError, match=r"^prefill_chunk_size gives a part .*leave it out$"):
            answers(model, tokens, small(name), prefill_chunk_size=size)
    parts = answers(model, tokens, policy_of("full"), prefill_chunk_size=size)
    assert torch.equal(parts, answers(model, tokens, prefill_chunk_size=size))


def test_a_question_may_be_read_in_parts(tiny, tokens, small):
    model, runs = tiny(), []
    for options in ({}, {"prefill_chunk_size": 4}):
        cache = small("snapkv").make_cache(model)
        model(tokens[:, :60], cache=cache)
        read = model.generate(tokens, cache=cache, max_new_tokens=3, **options, **GREEDY)
        runs.append(torch.stack(read.logits))
    assert_close(*runs, **CLOSE)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("name", ["full", "snapkv", "kivi"])
def test_another_batch_is_refused(name, padding, tiny, tokens, small):
    model = tiny()
    cache = small(name, **({"group": 16} if name == "kivi" else {})).make_cache(model)
    model(tokens, cache=cache, attention_mask=padded(tokens, padding))
    for rows in (tokens[:1, :1], tokens.repeat(2, 1)[:3, :5]):
        with pytest.raises(GatesError, match=f"holds 2 sequences, the batch has {len(rows)}: give"):
            model(rows, cache=cache)


@pytest.mark.parametrize("name", ["tova", "h2o", "knorm", "keydiff", "kivi", "quest", "oracle"])
def test_a_prompt_of_one_token(name, tiny, tokens, small):
    model = tiny()
    plain = model(tokens[:, :2]).logits[:, 1:]
    cache = small(name, **({"group": 16} if name == "kivi" else {})).make_cache(model)
    model(tokens[:, :1], cache=cache)
    assert_close(model(tokens[:, 1:2], cache=cache).logits, plain, **CLOSE)


def test_an_attention_that_was_set_is_not_replaced_silently(tiny, tokens, small):
    model = tiny()
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match=r"attended by 'eager', and from now on by 'sdpa'"):
        cache = small("snapkv").make_cache(model)
    with pytest.raises(GatesError, match="attends with output_attentions, which cache policies"):
        model(tokens, cache=cache, output_attentions=True)
    small("snapkv").make_cache(model)
    model.set_attn_implementation("eager")
    assert model(tokens, output_attentions=True).attentions[0].shape == (2, 4, 70, 70)


def test_a_model_without_its_cache_is_plain_again(tiny, tokens, small):
    model = tiny()
    plain, mask = model(tokens).logits, padded(tokens, 7)
    hidden = model(tokens, attention_mask=mask).logits
    for name in ("snapkv", "streaming"):
        small(name).make_cache(model)
    assert torch.equal(model(tokens).logits, plain)
    assert torch.equal(model(tokens, attention_mask=mask).logits, hidden)
    assert len(model.model.layers[0].self_attn._forward_pre_hooks) == 1


def test_a_cache_is_not_left_out_silently(tiny, tokens, small):
    model, other = tiny(), tiny()
    cache = small("snapkv").make_cache(model)
    other(tokens, cache=cache)
    with pytest.raises(
        GatesError, match=r"without its SnapKVPolicy: make the cache by policy.make_cache"
    ):
        other(tokens, cache=cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(GatesError, match="attends by 'sdpa', which leaves the policy"):
        model(tokens, cache=small("snapkv").make_cache(other))


def test_masks_that_are_refused(tiny, tokens, small):
    model = tiny()
    right, nothing, packed = (
        padded(tokens, 7).flip(1),
        padded(tokens, 70),
        torch.ones(2, 1, 70, 70, dtype=torch.bool).tril(),
    )
    packed[:, :, 30:, :30] = False
    bias = torch.zeros(2, 1, 70, 70).masked_fill(~packed, -1e9)
    for mask in (right, nothing, packed, bias):
        for name in ("snapkv", "tova", "a-shape"):
            with pytest.raises(GatesError, match=r"more than padding on the left.*padding_side"):
                model(tokens, attention_mask=mask, cache=small(name).make_cache(model))
    cache = small("snapkv").make_cache(model)
    model(tokens, cache=cache)
    with pytest.raises(GatesError, match="tokens after the prompt have padding"):
        model(
            tokens[:, :5],
            attention_mask=padded(torch.ones(2, 75), 0) * torch.tensor([1] * 74 + [0]),
            cache=cache,
        )
    with pytest.raises(GatesError, match=r"does not forget 3 tokens: copy.deepcopy"):
        cache.crop(-3)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("Mistral", {"sliding_window": 16}, "layer 0 of MistralModel has a DynamicSlidingWindow"),
        ("Mamba", {}, "layer 0 of MambaModel has a Linear"),
        ("Gemma2", {"head_dim": 16, "sliding_window": 4096}, "DynamicSlidingWindowLayer"),
        ("Gemma2", {**ALL_FULL, "head_dim": 16}, r"Gemma2Attention\) has attn_logit_softcapping"),
        ("GptOss", {**ALL_FULL, "num_local_experts": 2}, r"layers.0.self_attn .* has sinks, which"),
    ],
)
def test_caches_of_other_kinds_are_refused_by_name(family, settings, message, tiny):
    with pytest.raises(GatesError, match=message) as error:
        policy_of("full").make_cache(tiny(family, **settings))
    assert "\n" not in str(error.value)


def test_encoders_and_what_is_no_language_model_are_refused(tiny):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32))
    with pytest.raises(GatesError, match="is an encoder, expected a decoder"):
        policy_of("full").make_cache(bert)
    with pytest.raises(GatesError, match="not a model of transformers"):
        policy_of("snapkv").make_cache(torch.nn.Linear(2, 2))
    assert cache_argument(tiny()) == "cache"
    with pytest.raises(GatesError, match="takes no cache"):
        cache_argument(transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=32)))


def test_what_attention_cannot_do_is_refused(tiny, tokens, small):
    model = tiny(attention_dropout=0.1).train()
    with pytest.raises(GatesError, match=r"attends with dropout.*evaluation mode"):
        model(tokens, cache=small("snapkv").make_cache(model))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snap", {}, "policy is 'snap'; choose one of full, streaming, snapkv"),
        (
            "snapkv",
            {"windows": 3},
            "no option 'windows'; its options are keep, window, kernel, var",
        ),
        ("full", {"keep": 0.5}, "policy 'full' has no option 'keep'; it has none"),
        ("tova", {"keep": 0}, "keep must be above 0 and at most 1, got 0"),
        ("quest", {"keep": 1.5}, "keep must be above 0 and at most 1, got 1.5"),
        ("a-shape", {"keep": -1}, "keep must be above 0 and at most 1, got -1"),
        ("seer", {"keep": 2}, "keep must be above 0 and at most 1, got 2"),
        ("h2o", {"keep": "half"}, "policy 'h2o': keep must be above 0 and at most 1, got 'half'"),
        ("tova", {"keep": True}, "keep must be above 0 and at most 1, got True"),
        ("tova", {"keep": None}, "keep must be above 0 and at most 1, got None"),
        ("a-shape", {"keep": "nan"}, "keep must be above 0 and at most 1, got 'nan'"),
        ("h2o", {"variant": "paper"}, "variant is 'paper'; choose one of kvpress, published"),
        ("snapkv", {"kernel": 4}, "kernel must be odd, got 4"),
        ("kivi", {"bits": 3}, "bits must be one of 2, 4, 8, got 3"),
        ("kivi", {"bits": 4.0}, "bits must be a whole number, got 4.0"),
        ("kivi", {"residual": -1}, "residual must not be negative, got -1"),
        ("kivi", {"group": 0}, "group must be at least 1, got 0"),
        ("pyramidkv", {"beta": 0}, "beta must be at least 1, got 0"),
        ("chance", {"block": 0}, "block must be at least 1, got 0"),
        ("tri-shape", {"last": 1.5}, "last must be a whole number, got 1.5"),
        ("quest", {"page": True}, "page must be a whole number, got True"),
        ("knorm", {"variant": "paper"}, "variant is 'paper'; choose one of kvpress, published"),
        ("kivi", {"bits": 2, "group": 24}, "group must be a multiple of 16, .* got 24"),
        ("streaming", {"sinks": -1}, "sinks must not be negative, got -1"),
    ],
)
def test_options_that_are_refused(name, options, message):
    with pytest.raises(GatesError, match=message) as error:
        policy_of(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapkv", {"window": 71}, "window of 'snapkv' is 71, the prompt has 70 tokens"),
        ("snapkv", {"window": 36}, "window of 'snapkv' is 36, more than the 35 of 70 .* keep=0.5"),
        ("streaming", {"sinks": 36}, "sinks of 'streaming' is 36, more than the 35 of 70 tokens"),
        (
            "a-shape",
            {"keep": 0.1, "sinks": 7},
            "sinks of 'a-shape' is 7, expected fewer than the 7",
        ),
        ("kivi", {"group": 32}, "group=32 of 'kivi' does not divide the 16 features of a head of"),
    ],
)
def test_prompts_and_models_that_do_not_fit(name, options, message, tiny, tokens):
    model = tiny()
    with pytest.raises(GatesError, match=message):
        model(tokens, cache=policy_of(name, **options).make_cache(model))
