"""Blocks chosen once for several tokens: attention with a mask, and when they are chosen again."""

import copy

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.seer.decode import BlockSelector
from language.seer.attach import attach_block_gates, block_cache, block_gates, choose_blocks
from language.seer.kept import recent_blocks
from language.seer.recording import attending

BLOCK = 4
RULES = {
    "budget": BlockSelector(token_budget=3 * BLOCK, sinks=1, recent=2, block_size=BLOCK),
    "two": BlockSelector(k=2),
    "threshold": BlockSelector(threshold=0.15),  # of every head another number
    "window": BlockSelector(k=3, sinks=1, recent=2),
}


@pytest.fixture
def model(tiny):
    return gated(tiny())


def gated(made):
    """Attach gates for decoding that distinguish blocks."""
    generator = torch.Generator().manual_seed(3)
    for gate in attach_block_gates(made, "decode", block_size=BLOCK).values():
        for weight in gate.gate.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
    return made


def decoded(model, tokens, prompt, cache=None, mask=None):
    """Return the logits after a prompt, whose other tokens are read one by one."""
    cache, logits = cache or block_cache(model), []
    ends = [prompt, *range(prompt + 1, tokens.shape[1] + 1)]
    with torch.no_grad():
        for begin, end in zip([0, *ends], ends, strict=False):
            seen = None if mask is None else mask[:, :end]
            out = model(tokens[:, begin:end], cache=cache, attention_mask=seen)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


class Masked:
    """Attention with a dense mask in float64, of blocks chosen once for several tokens."""

    def __init__(self, selector, every, mask):
        self.selector, self.every, self.mask = selector, every, mask
        self.raw, self.chosen, self.calls = {}, {}, {}

    def __call__(self, gate, seen):
        name, length, new = gate.name, seen.k.shape[2], seen.q.shape[2]
        query, key = seen.raw()
        self.raw[name] = torch.cat([self.raw[name], key], 1) if name in self.raw else key
        padding = None if self.mask is None else ~self.mask[:, :length].bool()
        place = torch.arange(length)
        visible = (place <= place[length - new :, None])[None, None]
        if padding is not None:
            visible = visible & ~padding[:, None, None] | (place == place[length - new :, None])
        if new == 1:
            step = self.calls[name] = self.calls.get(name, -1) + 1
            if step % self.every == 0:
                keys = gate.gate.compress(self.raw[name], padding_mask=padding)
                blocks = self.selector(gate.gate.decode(query, keys)).clone()
                self.chosen[name] = blocks, (length - 1) // BLOCK
            blocks, last = self.chosen[name]
            kept = blocks.repeat_interleave(BLOCK, 3)[..., : last * BLOCK]
            later = torch.ones(*kept.shape[:3], length - kept.shape[3], dtype=torch.bool)
            visible = visible & torch.cat([kept, later], 3).repeat_interleave(2, 1)
        q, k, v = seen.q, *(x.repeat_interleave(2, 1) for x in (seen.k, seen.v))
        scores = (q.double() @ k.double().mT * seen.scale).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) @ v.double()).float()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padded", [0, 6])
def test_decoding_is_attention_with_the_mask_of_the_first_token_of_several(
    padded, rule, model, tokens
):
    """Prompts end within a block and with one; blocks begin while tokens read the same choice."""
    selector = RULES[rule]
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[1, :padded] = 0
    for every, prompt in ((1, 11), (3, 12), (8, 13)):
        choose_blocks(model, selector, every=every)
        read = decoded(model, tokens, prompt, mask=mask)
        with attending(model, Masked(selector, every, mask)):
            expected = decoded(model, tokens, prompt, mask=mask)
        assert_close(read, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        choose_blocks(model, None)
        assert (decoded(model, tokens, prompt, mask=mask) - expected).abs().max() > 0.05


def test_blocks_are_chosen_again_after_several_tokens_a_change_of_the_cache_and_a_rule(
    model, tokens, monkeypatch
):
    chosen = []
    for gate in block_gates(model).values():
        choose = gate.choose
        monkeypatch.setattr(
            gate, "choose", lambda *x, choose=choose: chosen.append(x[0].k.shape[2]) or choose(*x)
        )

    def read(change, cache):
        chosen.clear()
        change(cache)
        with torch.no_grad():
            for _ in range(4):
                model(tokens[:, :1], cache=cache)
        return chosen[::2]  # of the first of two layers

    choose_blocks(model, RULES["two"], every=3)
    caches = []
    for _ in range(2):
        caches.append(block_cache(model))
        decoded(model, tokens[:, :14], 12, caches[-1])  # 13 and 14 read what 13 has chosen
    cache, other = caches
    assert read(lambda _: None, cache) == [16]
    assert read(lambda _: None, copy.deepcopy(cache)) == [19, 22]
    assert read(lambda cache: cache.crop(-1), cache) == [18, 21]
    assert read(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), cache) == [22, 25]
    assert read(lambda _: choose_blocks(model, RULES["two"], every=4), other) == [15]
    with torch.no_grad():
        model(tokens[:, :2], cache=other)  # several at once, which read everything
    assert read(lambda _: None, other) == [21]


def test_a_cache_that_is_cropped_or_selected_decodes_as_one_that_had_been_so(tiny, tokens):
    """With one layer, whose keys do not depend on what was read."""
    model = gated(tiny(num_hidden_layers=1))
    choose_blocks(model, RULES["budget"])
    rows = torch.tensor([1])
    for change, left in (
        (lambda cache: cache.crop(-3), tokens[:, :15]),
        (lambda cache: cache.batch_select_indices(rows), tokens[1:, :18]),
    ):
        caches = block_cache(model), block_cache(model)
        decoded(model, tokens[:, :18], 12, caches[0])
        change(caches[0])
        decoded(model, left, left.shape[1], caches[1])
        more = tokens[: len(left), 20:]
        found = [decoded(model, more, 1, cache) for cache in caches]
        assert_close(*found, rtol=1e-4, atol=1e-4)


def test_below_a_length_everything_is_read_and_blocks_are_from_it_on(model, tokens):
    dense = decoded(model, tokens, 10)
    choose_blocks(model, RULES["two"], dense_below=19)
    read = decoded(model, tokens, 10)
    assert torch.equal(read[:, :9], dense[:, :9])  # up to the token that makes 18
    assert (read[:, 9] - dense[:, 9]).abs().max() > 0.01
    choose_blocks(model, RULES["two"], dense_below=99)
    assert torch.equal(decoded(model, tokens, 10), dense)
    assert {gate.density for gate in block_gates(model).values()} == {1.0}


def test_the_density_counts_blocks_that_begin_after_the_choice(model, tokens):
    choose_blocks(model, BlockSelector(threshold=1.0), every=6)
    decoded(model, tokens, 13)  # the own block of each choice at 14 and 20, and later ones
    read = [1, 1, 1, 2, 2, 2, 1, 2, 2, 2, 2, 3, 1]
    allowed = [-(-length // BLOCK) for length in range(14, 27)]
    for gate in block_gates(model).values():
        assert gate.density == pytest.approx(sum(read) / sum(allowed))


def test_wrong_numbers_of_tokens_are_one_line(refuses, model):
    refuses(
        ValueError,
        ("every must be", lambda: choose_blocks(model, RULES["two"], every=0)),
        ("dense_below must not be negative", lambda: choose_blocks(model, None, dense_below=-1)),
    )


def test_three_quarters_of_a_budget_are_the_last_blocks():
    assert [recent_blocks(blocks) for blocks in (0, 2, 3, 4, 8, 16, 32)] == [2, 2, 2, 3, 6, 12, 24]
