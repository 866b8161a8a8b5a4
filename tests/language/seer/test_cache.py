"""Decoding with block gates: the same tokens as dense where all is kept, and what is remembered."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.seer.decode import BlockSelector
from core_gates.errors import GatesError
from language.seer.attach import attach_block_gates, block_cache, block_gates, choose_blocks
from language.seer.attention import unrotated

BLOCK = 4
FEW = BlockSelector(token_budget=2 * BLOCK, block_size=BLOCK)
ALL = BlockSelector(token_budget=128, block_size=BLOCK)


@pytest.fixture
def decoding(tiny):
    """``decoding(**settings)``: a model with gates for decoding that distinguish blocks."""

    def build(**settings):
        model = tiny(**settings)
        generator = torch.Generator().manual_seed(3)
        for gate in attach_block_gates(model, "decode", block_size=BLOCK).values():
            for weight in gate.gate.parameters():
                weight.data.copy_(torch.randn(weight.shape, generator=generator))
        return model

    return build


def off(x, expected):
    return (x - expected).norm() / expected.norm()


def continued(model, prompts, selector, every=8, **options):
    choose_blocks(model, selector, every=every)
    cache = block_cache(model) if selector is not None else None
    settings = {"max_new_tokens": 14, "do_sample": False, "cache": cache, **options}
    return model.generate(prompts, **settings)


@pytest.mark.parametrize("heads", [{}, {"num_key_value_heads": 1}])
@pytest.mark.parametrize("beams", [1, 3])
def test_where_all_is_kept_the_tokens_are_those_of_dense(beams, heads, decoding, tokens):
    model = decoding(**heads)
    for length in (1, BLOCK - 1, BLOCK, BLOCK + 1, 13):
        prompts = tokens[:, :length]
        dense = continued(model, prompts, None, num_beams=beams)
        kept = continued(model, prompts, ALL, num_beams=beams)
        assert kept.tolist() == dense.tolist()
    few = continued(model, tokens[:, :13], FEW, num_beams=beams)
    assert few.tolist() != dense.tolist()


def test_a_left_padded_batch_is_its_single_prompts_where_all_is_kept(decoding, tokens):
    model = decoding()
    prompts, mask = tokens[:, :13].clone(), torch.ones(2, 13, dtype=torch.long)
    prompts[1, :6] = mask[1, :6] = 0
    batch = continued(model, prompts, ALL, attention_mask=mask)
    for row, begin in ((0, 0), (1, 6)):
        single = continued(model, prompts[row : row + 1, begin:], ALL)
        assert batch[row, begin:].tolist() == single[0].tolist()
    other = prompts.where(mask.bool(), 9)
    few = continued(model, prompts, FEW, attention_mask=mask)
    assert (
        few[:, 13:].tolist() == continued(model, other, FEW, attention_mask=mask)[:, 13:].tolist()
    )


def compressed(model, tokens, cache, steps=None):
    """Read tokens, the last ``steps`` of them one by one, and return what is compressed."""
    with torch.no_grad():
        read = tokens[:, : tokens.shape[1] - (steps or 1)]
        if read.shape[1]:
            model(read, cache=cache)
        for position in range(read.shape[1], tokens.shape[1]):
            model(tokens[:, position : position + 1], cache=cache)
    return [layer.compressed for layer in cache.layers[:-1]]


def test_compression_over_three_ends_of_a_block_is_that_of_the_prompt(decoding, tokens):
    model = decoding()
    choose_blocks(model, ALL, every=1)
    at_once = compressed(model, tokens, block_cache(model))
    one_by_one = compressed(model, tokens, block_cache(model), steps=4 * BLOCK - 1)
    for (blocks, _), (others, _) in zip(at_once, one_by_one, strict=True):
        assert blocks.shape[:3] == (2, 6, 2)
        assert off(others, blocks) <= 1e-6


def test_cropped_reordered_repeated_and_selected_is_as_if_it_had_been_so(decoding, tokens):
    """Each is compared with reading the tokens that it leaves; cut inside a block and before."""
    model = decoding()
    choose_blocks(model, ALL, every=1)

    def cache_of(read):
        cache = block_cache(model)
        compressed(model, read, cache)
        return cache

    rows = torch.tensor([1, 1, 0])
    changes = [
        (lambda cache: cache.crop(-7), tokens[:, :19]),
        (lambda cache: cache.crop(-2), tokens[:, :24]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), tokens[[1, 0]]),
        (lambda cache: cache.batch_repeat_interleave(2), tokens[[0, 0, 1, 1]]),
        (lambda cache: cache.batch_select_indices(rows), tokens[rows]),
    ]
    for change, left in changes:
        cache, more = cache_of(tokens), left[:, :5]
        change(cache)
        expected = cache_of(left)
        found = [compressed(model, more, one, steps=5) for one in (cache, expected)]
        assert cache.get_seq_length() == expected.get_seq_length() == left.shape[1] + 5
        for (blocks, _), (others, _) in zip(*found, strict=True):
            assert off(blocks, others) <= 1e-6
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(compressed(model, tokens, cache)[0][0], cache_of(tokens).layers[0].compressed[0])


def test_buffers_are_written_in_place_and_the_angles_undo_the_rotation(decoding, tokens):
    model = decoding()
    choose_blocks(model, FEW)
    cache = block_cache(model)
    compressed(model, tokens[:, :14], cache)
    layer = cache.layers[0]
    before = layer.keys
    with torch.no_grad():
        model(tokens[:, 14:15], cache=cache)
    assert layer.keys.data_ptr() == before.data_ptr()
    projected = []
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_hook(lambda _module, _inputs, y: projected.append(y))
    with torch.no_grad():
        model(tokens[:, :15])
    raw = unrotated(layer.keys, cache.table)
    assert (raw.flatten(2) - projected[0]).norm() <= 2e-6 * projected[0].norm()


@pytest.mark.fault("46 A4")
def test_the_density_counts_what_assisted_decoding_reads(decoding, tokens):
    """Several tokens that are checked at once read everything; one alone reads its own block."""
    model, calls = decoding(), []
    own = BlockSelector(threshold=1.0)
    model.model.register_forward_pre_hook(
        lambda _module, _args, given: calls.append(
            (given["cache"].get_seq_length(), given["input_ids"].shape[1])
        ),
        with_kwargs=True,
    )
    prompts = tokens[:1, :5].repeat(1, 3)
    greedy = continued(model, prompts, own, every=1)
    blocks = [position // BLOCK + 1 for position in range(15, 15 + 13)]
    for gate in block_gates(model).values():
        assert gate.density == pytest.approx(13 / sum(blocks))
    calls.clear()
    assisted = continued(model, prompts, own, every=1, prompt_lookup_num_tokens=3)
    assert assisted.shape == greedy.shape
    read = allowed = 0
    for begin, number in calls[1:]:
        rows = [position // BLOCK + 1 for position in range(begin, begin + number)]
        read, allowed = read + (1 if number == 1 else sum(rows)), allowed + sum(rows)
    assert any(number > 1 for _, number in calls[1:])
    for gate in block_gates(model).values():
        assert gate.density == pytest.approx(read / allowed)


@pytest.mark.fault("46 A4")
def test_decoding_without_a_cache_is_refused_in_one_line(decoding, tokens):
    model = decoding()
    choose_blocks(model, FEW)
    with pytest.raises(GatesError, match=r"^\S+ got no cache, .*block_cache\(model\)[^\n]*$"):
        model.generate(tokens, max_new_tokens=2, use_cache=False)
    choose_blocks(model, None)
    assert model(tokens, use_cache=False).logits.isfinite().all()
