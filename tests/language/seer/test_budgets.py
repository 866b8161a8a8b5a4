"""Budgets of blocks: what a model with them computes, their file, and what is refused."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.seer.decode import BlockSelector
from core_gates.errors import GatesError
from language.hf.gate_file import write_gates
from language.seer.attach import attach_block_gates, block_cache, block_gates, choose_blocks
from language.seer.budgets import (
    CHOOSERS,
    KIND,
    Budgets,
    causal_density,
    digest_of,
    load_budgets,
    save_budgets,
)
from language.seer.recording import attending
from language.seer.rivals import SCORES, SINK_MEAN_POOL, SINK_WINDOW, gate_scores, with_first

BLOCK = 4
BLOCKS = torch.tensor([[1, 2, 3, 4], [2, 5, 1, 3]])
WHICH = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def model(tiny):
    made = tiny()
    generator = torch.Generator().manual_seed(2)
    for gate in attach_block_gates(made, block_size=BLOCK).values():
        gate.gate.weight_k.data.copy_(torch.randn(gate.gate.weight_k.shape, generator=generator))
    return made


def budgets_for(model, blocks=BLOCKS, **options):
    gates = block_gates(model)
    facts = {"block_size": BLOCK, "density": 0.5, "length": 7, "gates": digest_of(inner(model))}
    return Budgets(
        dict(zip(gates, blocks, strict=True)),
        dict(zip(gates, WHICH, strict=True)),
        **(facts | options),
    )


def inner(model):
    return {name: gate.gate for name, gate in block_gates(model).items()}


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, **options).logits


def masked(gate, seen, blocks, which):
    """Return attention with a dense mask: own block, the first one, and the best of each head."""
    length = seen.q.shape[2]
    scores = (SCORES[SINK_WINDOW], SCORES[SINK_MEAN_POOL], lambda *x: with_first(gate_scores, *x))
    heads = []
    for head, (number, chooser) in enumerate(zip(blocks.tolist(), which.tolist(), strict=True)):
        own = scores[chooser](gate, seen)[0, head].double()
        mask = torch.zeros(length, length, dtype=torch.bool)
        for row in range(length):
            order = own[row // BLOCK, : row // BLOCK + 1].clone()
            order[-1] = torch.inf
            for block in order.argsort(descending=True, stable=True)[:number].tolist():
                mask[row, block * BLOCK : (block + 1) * BLOCK] = True
        mask &= torch.ones(length, length, dtype=torch.bool).tril()
        k, v = (x[0, head // 2] for x in (seen.k, seen.v))
        weights = (seen.q[0, head] @ k.T * seen.scale).masked_fill(~mask, -torch.inf).softmax(-1)
        heads.append(weights @ v)
    return torch.stack(heads)[None]


def test_attention_with_budgets_is_that_with_a_dense_mask(model, tokens):
    tokens, budgets = tokens[:1], budgets_for(model)
    choose_blocks(model, budgets)
    found = logits(model, tokens)
    read = [gate.density for gate in block_gates(model).values()]
    assert read == pytest.approx([float(causal_density(m.double(), 7).mean()) for m in BLOCKS])

    def attend(gate, seen):
        return masked(gate, seen, budgets.blocks[gate.name], budgets.choosers[gate.name])

    with attending(model, attend):
        expected = logits(model, tokens)
    assert_close(found, expected, **CLOSE)
    choose_blocks(model, None)
    assert (logits(model, tokens) - found).abs().max() > 0.05


def test_a_padded_batch_reads_as_its_texts_alone_and_chunks_as_the_whole(model, tokens):
    choose_blocks(model, budgets_for(model, length=6))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :8] = 0
    tokens = tokens[:, :24]
    whole = logits(model, tokens, attention_mask=mask)
    assert whole.isfinite().all()
    other = tokens.where(mask.bool(), (tokens + 7) % 64)
    assert torch.equal(logits(model, other, attention_mask=mask)[1, 8:], whole[1, 8:])
    choose_blocks(model, budgets_for(model, length=6))
    expected, cache = logits(model, tokens), block_cache(model)
    assert_close(whole[0], expected[0], **CLOSE)
    choose_blocks(model, budgets_for(model, BLOCKS.clamp(max=2)))  # which no length changes
    expected = logits(model, tokens)
    parts = [logits(model, tokens[:, a : a + 8], cache=cache) for a in (0, 8, 16)]
    assert_close(torch.cat(parts, 1), expected, **CLOSE)


def test_other_lengths_keep_one_and_two_blocks_and_the_density():
    blocks = torch.tensor([1, 2, 3, 5, 9] * 20)
    density = float(causal_density(blocks.double(), 32).mean())
    budgets = Budgets({"a": blocks}, {"a": blocks * 0}, 32, density, 32)
    assert torch.equal(budgets.at(32)["a"], blocks)
    for length in (3, 16, 48, 64, 128):
        m = budgets.at(length)["a"]
        assert (m <= length).all()
        assert m[:2].tolist() == [1, 2]
        assert m.unique().numel() <= 5
        if length >= 16:
            read = float(causal_density(m.double(), length).mean())
            assert 0.8 * density < read <= density
    c = [(m - 2) / (n - 2) for m, n in zip(budgets.at(128)["a"][3:5], (5, 9), strict=True)]
    assert c[0] == pytest.approx(float(c[1]), abs=0.2)


def test_below_two_blocks_everything_is_read_and_said_once(model, tokens):
    bare = logits(model, tokens[:, :7])
    choose_blocks(model, budgets_for(model))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_close(logits(model, tokens[:, :7]), bare, **CLOSE)
            logits(model, tokens[:, :8])
    (one,) = (str(warning.message) for warning in said)
    assert one.startswith("a text of 7 tokens has less than two blocks of 4: everything is read")


def test_a_file_returns_them_to_their_model(model, tiny, tokens, tmp_path):
    budgets = budgets_for(model)
    path = save_budgets(model, budgets, tmp_path / "budgets.safetensors")
    choose_blocks(model, budgets)
    expected = logits(model, tokens)
    found = load_budgets(model, path)
    choose_blocks(model, found)
    assert torch.equal(logits(model, tokens), expected)
    assert (found.density, found.length, found.gates) == (0.5, 7, budgets.gates)
    assert path.stat().st_size < 2500
    bare = tiny()
    assert load_budgets(bare, path).blocks.keys() == found.blocks.keys()  # gates may come later


def test_what_does_not_fit_is_refused_in_one_line(model, tiny, refused, tmp_path):
    path = save_budgets(model, budgets_for(model), tmp_path / "budgets.safetensors")
    other = tiny()
    other.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    refused("with other weights", load_budgets, other, path)
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    refused("of the base model .*, this one is", load_budgets, other, path)
    larger = tiny()
    attach_block_gates(larger, block_size=8)
    refused("in blocks of 4, the gates have 8", choose_blocks, larger, load_budgets(larger, path))
    fresh = tiny()
    attach_block_gates(fresh, block_size=BLOCK)
    refused("were calibrated with the gates", choose_blocks, fresh, load_budgets(fresh, path))
    decoding = tiny()
    attach_block_gates(decoding, "decode", block_size=BLOCK)
    refused("budgets are of prompts", choose_blocks, decoding, load_budgets(decoding, path))
    budgets = budgets_for(model)
    last = list(budgets.blocks)[-1]
    del budgets.blocks[last], budgets.choosers[last]
    refused(f"no heads of {last}, expected 4", choose_blocks, model, budgets)
    options = {"block_size": BLOCK, "density": 0.5, "length": 7, "gates": ""}
    tensors = {name: torch.stack([BLOCKS[0], WHICH[0]]) for name in budgets.blocks}
    facts = {**options, "choosers": ["best"]}
    write_gates(path, model, kind=KIND, options=facts, tensors=tensors)
    refused("other choosers than", load_budgets, model, path)
    write_gates(path, model, kind=KIND, options=facts | {"choosers": CHOOSERS}, tensors=tensors)
    refused(f"no heads of {last}", choose_blocks, model, load_budgets(model, path))
    refused("expected 'block'", load_like_gates, model, path)


def load_like_gates(model, path):
    from language.seer.block_files import load_block_gates

    load_block_gates(model, path)


def test_the_rule_of_budgets_is_that_of_the_selector(model, tokens):
    """With equal budgets and gates alone, ``k`` blocks of which the first and own ones are two."""
    budgets = budgets_for(model, torch.full((2, 4), 3))
    for which in budgets.choosers.values():
        which.fill_(CHOOSERS.index("gate"))
    choose_blocks(model, budgets)
    found = logits(model, tokens)
    choose_blocks(model, BlockSelector(k=3, sinks=1, recent=1, dense_rows=0))
    assert torch.equal(logits(model, tokens), found)
    with pytest.raises(GatesError, match="have 4"):
        choose_blocks(model, budgets_for(model, block_size=16))
