"""Block gates on models of transformers, compared with the models without them."""

import copy

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.seer.decode import BlockSelector
from core_gates.errors import GatesError
from language.seer.attach import (
    attach_block_gates,
    block_cache,
    block_gates,
    choose_blocks,
    detach_block_gates,
)
from language.seer.attention import attend_to_all

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN["original_max_position_embeddings"] = 32
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Olmo": {},
    "Phi3": {"partial_rotary_factor": 1.0},
    "Yarn": {"rope_parameters": YARN},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EVERYTHING = BlockSelector(nz_ratio=1.0)
ALL_BLOCKS = {"token_budget": 128, "block_size": 4}


def made(tiny, family, **settings):
    name = "Llama" if family == "Yarn" else family
    return tiny(name, **FAMILIES[family], **settings)


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, **options).logits


def enlarged(gates):
    """Give gates weights that distinguish blocks."""
    generator = torch.Generator().manual_seed(3)
    for gate in gates.values():
        for weight in gate.gate.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_the_model_and_detached_it_is_again(family, tiny, tokens):
    model = made(tiny, family)
    bare, names = logits(model, tokens), list(model.state_dict())
    gates = attach_block_gates(model, block_size=4)
    assert_close(logits(model, tokens), bare, **CLOSE)
    choose_blocks(model, EVERYTHING)
    assert_close(logits(model, tokens), bare, **CLOSE)
    assert [gate.density for gate in gates.values()] == [1.0, 1.0]
    enlarged(gates)
    choose_blocks(model, BlockSelector(k=1, dense_rows=0))
    assert [gate.density for gate in gates.values()] == [None, None]
    sparse = logits(model, tokens)
    densities = [gate.density for gate in gates.values()]
    logits(model, tokens)
    assert [gate.density for gate in gates.values()] == densities
    assert (sparse - bare).abs().max() > 0.05
    assert torch.equal(logits(copy.deepcopy(model), tokens), sparse)
    assert all(0 < density < 0.6 for density in densities)
    assert detach_block_gates(model) == gates
    assert torch.equal(logits(model, tokens), bare)
    assert list(model.state_dict()) == names
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_autocast_reads_everything_as_the_model_does(tiny, tokens):
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, tokens).float()
        attach_block_gates(model, block_size=4)
        choose_blocks(model, EVERYTHING)
        found = logits(model, tokens).float()
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Yarn"])
def test_what_arrives_is_rotated_back_to_the_projections(family, tiny, tokens):
    """Of the attention that the gates see: within 2e-6 of queries and keys before rotation."""
    model, found, projected = made(tiny, family), [], []
    gates = attach_block_gates(model, block_size=4)

    def attend(gate, seen):
        found.append(seen.raw())
        return attend_to_all(seen)

    for layer, gate in zip(model.model.layers, gates.values(), strict=True):
        gate.attend = attend
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).register_forward_hook(
                lambda _module, _inputs, y: projected.append(y)
            )
    logits(model, tokens)
    for number, (q, k) in enumerate(found):
        for x, y in ((q, projected[2 * number]), (k, projected[2 * number + 1])):
            assert (x.flatten(2) - y).norm() <= 2e-6 * y.norm()


def test_padding_is_never_attended(tiny, tokens):
    """What padding holds changes nothing; whole blocks of it are left out."""
    model = tiny()
    enlarged(attach_block_gates(model, block_size=4))
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    for selector in (None, BlockSelector(k=2, dense_rows=0)):
        choose_blocks(model, selector)
        other = tokens.where(mask.bool(), (tokens + 7) % 64)
        first, second = (logits(model, x, attention_mask=mask) for x in (tokens, other))
        assert_close((first[0], first[1, 9:]), (second[0], second[1, 9:]), rtol=0, atol=0)
        assert first.isfinite().all()
    choose_blocks(model, None)
    alone = logits(model, tokens[1:, 9:])
    assert_close(logits(model, tokens, attention_mask=mask)[1:, 9:], alone, **CLOSE)


def in_chunks(model, tokens, sizes, mask=None):
    """Return the logits of a prompt that is read in chunks after one cache."""
    cache, found, begin = block_cache(model), [], 0
    for size in sizes:
        seen = None if mask is None else mask[:, : begin + size]
        part = tokens[:, begin : begin + size]
        found.append(logits(model, part, cache=cache, attention_mask=seen))
        begin += size
    return torch.cat(found, 1)


@pytest.mark.fault("46 A4")
def test_a_prompt_in_chunks_is_sparse_in_each_and_its_density_is_that_of_the_whole(tiny, tokens):
    model, tokens = tiny(), tokens[:, :24]
    bare = logits(model, tokens)
    gates = attach_block_gates(model, block_size=4).values()
    enlarged({str(number): gate for number, gate in enumerate(gates)})
    rule = BlockSelector(k=1, dense_rows=0)
    choose_blocks(model, rule)
    whole = logits(model, tokens)
    density = [gate.density for gate in gates]
    for sizes in ((8, 8, 8), (16, 8), (8, 16)):
        choose_blocks(model, rule)
        assert_close(in_chunks(model, tokens, sizes), whole, **CLOSE)
        assert [gate.density for gate in gates] == density
    assert (whole - bare).abs().max() > 0.05
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens, **options)
    cache = block_cache(model)
    choose_blocks(model, rule)
    found = model.generate(tokens, prefill_chunk_size=8, cache=cache, **options)
    assert (found.tolist(), [gate.density for gate in gates]) == (expected.tolist(), density)


@pytest.mark.fault("46 A4")
def test_chunks_that_begin_inside_a_block_read_what_is_kept_and_the_last_rows(tiny, tokens):
    model = tiny()
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    bare = logits(model, tokens, attention_mask=mask)
    gates = attach_block_gates(model, block_size=4)
    enlarged(gates)
    choose_blocks(model, EVERYTHING)
    for sizes in ((10, 16), (13, 6, 7)):
        found = in_chunks(model, tokens, sizes, mask)
        assert_close(found[mask.bool()], bare[mask.bool()], **CLOSE)
    assert_close(in_chunks(model, tokens[:1], (5, 7, 14)), bare[:1], **CLOSE)
    choose_blocks(model, BlockSelector(k=1, dense_rows=9))
    found = in_chunks(model, tokens[:1], (5, 7, 14))
    assert_close(found, bare[:1], **CLOSE)
    assert [gate.density for gate in gates.values()] == [1.0, 1.0]
    choose_blocks(model, BlockSelector(k=1, dense_rows=1))
    in_chunks(model, tokens[:1], (8, 16))  # rows of 1, 2 and 3, 4, 5, 6 blocks
    for gate in gates.values():
        assert (1 + 2 + 1 + 1 + 1 + 6) / 21 <= gate.density <= (1 + 2 + 2 + 2 + 2 + 6) / 21


@pytest.mark.fault("46 A4")
def test_a_long_chunk_after_another_cache_is_refused_and_a_short_one_counts_as_read(tiny, tokens):
    model = tiny()
    gates = attach_block_gates(model, block_size=4)
    enlarged(gates)
    choose_blocks(model, BlockSelector(threshold=1.0, dense_rows=0))  # the own block alone
    with torch.no_grad():
        cache = model(tokens[:, :12]).cache
        with pytest.raises(GatesError, match=r"got a DynamicCache.* cache=block_cache\(model\)"):
            model(tokens[:, 12:], cache=cache)
        model(tokens[:, 12:15], cache=cache)
        model(tokens[:, 15:16], cache=cache)  # a token that is decoded is no prompt
    for gate in gates.values():
        assert gate.density == pytest.approx((3 + 4) / (1 + 2 + 3 + 4))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("GPT2", {}, "no rotary positions"),
        ("Bloom", {}, "attends by itself"),
        ("GPTJ", {"rotary_dim": 4}, "no rotation that is known"),
        ("GPTNeoX", {"rotary_pct": 0.5}, "rotates 4 of 8 features"),
        ("Cohere", {}, "rotates its features in another way"),
        ("Gemma2", {"head_dim": 8}, "attn_logit_softcapping"),
        ("Mistral", {"sliding_window": 8}, "sliding_window"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "1.self_attn .* does not rotate, while other"),
        ("DiffLlama", {}, "DiffLlamaAttention.* has lambda_k2"),
        ("Doge", {}, "DogeAttention.* has A:"),
        ("HunYuanDenseV1", {"head_dim": 8}, "norms queries and keys after their rotation"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(name, settings, words, tiny):
    model = tiny(name, **settings)
    implementation = model.config._attn_implementation
    with pytest.raises(GatesError, match=words) as caught:
        attach_block_gates(model)
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == implementation


def test_another_attention_does_not_leave_the_gates_out_without_a_word(refuses, tiny, tokens):
    model = tiny()
    enlarged(attach_block_gates(model, block_size=4))
    choose_blocks(model, BlockSelector(k=1, dense_rows=0))
    sparse = logits(model, tokens)
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        words = f"attends by '{other}', which leaves its block gate out: call model.set_attn"
        refuses(GatesError, (words, lambda: logits(model, tokens)))
    model.set_attn_implementation("gates_blocks")
    assert torch.equal(logits(model, tokens), sparse)
    model.set_attn_implementation("eager")
    detach_block_gates(model)
    assert logits(model, tokens).isfinite().all()


def test_a_compiled_model_is_not_compiled_again_for_every_call(tiny, tokens):
    model = tiny(num_hidden_layers=1)
    enlarged(attach_block_gates(model, block_size=4))
    choose_blocks(model, BlockSelector(k=1, dense_rows=0))
    expected = logits(model, tokens)
    model.model.layers[0].self_attn.compile(backend="eager")
    for _ in range(2):
        assert_close(logits(model, tokens), expected, **CLOSE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert_close(logits(model, tokens), expected, **CLOSE)


def test_wrong_calls_are_one_line(refuses, tiny, tokens, monkeypatch):
    model = tiny()
    refuses(GatesError, ("no block gates", lambda: block_gates(model)))
    for size in (0, 2.5, True, "4", float("nan")):
        with pytest.raises(ValueError, match="block_size must be"):
            attach_block_gates(model, block_size=size)
    refuses(GatesError, ("kind", lambda: attach_block_gates(model, "both")))
    attach_block_gates(model, "decode", block_size=4)
    refuses(
        GatesError,
        ("already", lambda: attach_block_gates(model)),
        ("in blocks of 64", lambda: choose_blocks(model, BlockSelector(token_budget=64))),
    )
    right = torch.ones_like(tokens)
    right[0, -3:] = 0
    for words, options in (
        ("padding on the right", {"attention_mask": right}),
        ("a mask of pairs", {"attention_mask": torch.ones(2, 1, 26, 26, dtype=torch.bool)}),
        ("packed", {"position_ids": (torch.arange(26) % 13).repeat(2, 1)}),
    ):
        with pytest.raises(GatesError, match=words) as caught:
            model(tokens, **({"use_cache": False} | options))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(GatesError, match="not told whether sequences are packed: give attention"):
        model(tokens, position_ids=(torch.arange(26) % 13).repeat(2, 1), use_cache=False)
    monkeypatch.undo()
    choose_blocks(model, BlockSelector(**ALL_BLOCKS))
    for foreign in ({}, {"cache_implementation": "static"}):
        with pytest.raises(GatesError, match=r"got a (Dynamic|Static)Cache"):
            model.generate(tokens, max_new_tokens=2, **foreign)
