import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates.attention.seer.decode import BlockSelector, block_density
from core_gates.errors import GatesError

LOWEST = torch.finfo(torch.float32).min
RULES = [
    {"threshold": 0.2},
    {"nz_ratio": 0.5},
    {"token_budget": 128},
    {"k": 2},
    {"p": 0.6},
]


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_threshold_compares_probabilities():
    row = torch.tensor([[0.5, 0.26, 0.14, 0.1]]).log()
    selector = BlockSelector(threshold=0.2)
    assert selector(row).tolist() == [[True, True, False, True]]
    assert BlockSelector(threshold=0.6)(row).tolist() == [[False, False, False, True]]


def test_k_and_budget():
    row = torch.tensor([[0.5, 0.26, 0.9, 0.1, 0.2]])
    for selector in (BlockSelector(k=2), BlockSelector(token_budget=47, block_size=16)):
        assert selector(row).tolist() == [[True, False, True, False, True]]
    assert BlockSelector(k=99)(row).all()


def test_ties_go_to_the_lowest_index():
    row = torch.zeros(1, 40)
    assert BlockSelector(k=3)(row)[0].nonzero().flatten().tolist() == [0, 1, 2, 39]
    assert BlockSelector(p=0.1)(row)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 39]


@pytest.mark.parametrize("options", [{"k": 3}, {"token_budget": 50, "block_size": 16}], ids=str)
def test_the_first_and_the_last_blocks_count_in_the_budget(options):
    row = torch.tensor([[0.5, 0.1, 0.9, 0.8, 0.3, 0.2]])
    found = {
        (sinks, recent): BlockSelector(**options, sinks=sinks, recent=recent)(row)[0]
        for sinks, recent in ((0, 0), (0, 1), (1, 1), (1, 2), (2, 1), (3, 0))
    }
    kept = {always: mask.nonzero().flatten().tolist() for always, mask in found.items()}
    assert kept[0, 0] == [0, 2, 3, 5]  # the own block is one more, as published
    assert kept[0, 1] == [2, 3, 5]
    assert kept[1, 1] == [0, 2, 5]
    assert kept[1, 2] == [0, 4, 5]
    assert kept[2, 1] == [0, 1, 5]
    assert kept[3, 0] == [0, 1, 2, 5]


def test_the_first_blocks_are_those_after_the_padding():
    scores = logits(2, 6, 6)
    scores[0, :, :2] = scores[0, :2] = LOWEST
    mask = BlockSelector(k=2, sinks=1, recent=1, dense_rows=0)(scores)
    rows = torch.arange(6)
    for begin, kept in zip((2, 0), mask, strict=True):
        expected = torch.eye(6, dtype=torch.bool)
        expected[begin:, begin] = True
        assert torch.equal(kept, expected)
        assert kept[begin:].sum(-1).tolist() == (rows[begin:] - begin + 1).clamp(max=2).tolist()


def test_what_is_always_kept_counts_in_the_sum_and_joins_a_threshold():
    row = torch.tensor([[0.05, 0.5, 0.3, 0.05, 0.1]]).log()
    kept = BlockSelector(p=0.6, sinks=1, recent=1)(row)
    assert kept.tolist() == [[True, True, False, False, True]]
    kept = BlockSelector(threshold=0.4, sinks=1, recent=2)(row)
    assert kept.tolist() == [[True, True, False, True, True]]


def test_every_head_has_its_own_number_of_blocks():
    scores, blocks = logits(2, 3, 7, 7), torch.tensor([1, 3, 6])
    sinks = (blocks > 1).long()
    mask = BlockSelector(k=blocks, sinks=sinks, recent=1, dense_rows=0)(scores)
    for head, (k, first) in enumerate(zip(blocks.tolist(), sinks.tolist(), strict=True)):
        alone = BlockSelector(k=k, sinks=first, recent=1, dense_rows=0)(scores[:, head])
        assert torch.equal(mask[:, head], alone)
        assert alone.sum(-1).eq(torch.arange(1, 8).clamp(max=k)).all()
    step = BlockSelector(k=blocks, sinks=sinks, recent=1)(scores[:, :, -1:])
    assert torch.equal(step, mask[:, :, -1:])


def test_p_stops_at_the_sum():
    row = torch.tensor([[0.05, 0.5, 0.3, 0.14, 0.01]]).log()
    assert BlockSelector(p=0.45)(row).tolist() == [[False, True, False, False, True]]
    assert BlockSelector(p=0.79)(row).tolist() == [[False, True, True, False, True]]
    assert BlockSelector(p=1.0)(row).all()


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 1), (0.3, 1), (0.6, 3), (1.0, 9)])
def test_ratio_of_the_causal_area(ratio, kept):
    mask = BlockSelector(nz_ratio=ratio, dense_rows=0)(logits(9, 9).tril())
    chosen = mask & ~torch.eye(9, dtype=torch.bool)
    assert (chosen.sum(-1) <= torch.arange(9).clamp(max=kept)).all()
    assert (chosen.sum(-1) >= torch.arange(9).clamp(max=kept) - 1).all()


def test_last_rows_of_a_square_map_are_dense():
    selector = BlockSelector(k=1)
    mask = selector(logits(2, 3, 8, 8))
    assert mask[..., 6:, :].sum((-2, -1)).eq(7 + 8).all()
    assert mask[..., :6, :].sum(-1).le(2).all()
    assert selector(logits(2, 3, 1, 8)).sum(-1).le(2).all()
    assert BlockSelector(k=1, dense_rows=0)(logits(8, 8)).sum(-1).le(2).all()
    assert torch.equal(BlockSelector(k=1, dense_rows=20)(logits(8, 8)), torch.ones(8, 8).tril() > 0)


def test_hidden_blocks_are_never_chosen():
    scores = logits(2, 6, 6)
    scores[0, :, :2] = scores[0, :2] = LOWEST  # two blocks of padding
    for options in RULES:
        mask = BlockSelector(**options)(scores)[0]
        assert torch.equal(mask[:2], torch.eye(6, dtype=torch.bool)[:2])
        assert not mask[2:, :2].any()


@pytest.mark.fault("core A13")
@pytest.mark.parametrize("content", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", RULES, ids=str)
def test_logits_that_are_not_finite_are_refused(refuses, options, content):
    scores = logits(2, 6, 6).tril() + torch.full((6, 6), LOWEST).triu(1)
    selector = BlockSelector(**options)
    future = scores.clone()
    future[0, 2, 4] = content
    assert torch.equal(selector(future), selector(scores))
    scores[1, 4, 1] = content
    refuses(GatesError, ("1 of the logits to choose from are not finite", lambda: selector(scores)))


@pytest.mark.parametrize("options", RULES, ids=str)
@given(st.integers(1, 7), st.integers(0, 4), st.integers(0, 99))
def test_the_diagonal_and_nothing_of_the_future(options, rows, more, seed):
    scores = logits(2, rows, rows + more, seed=seed) * 3
    mask = BlockSelector(**options)(scores)
    assert mask.diagonal(more, -2, -1).all()
    assert not mask.triu(more + 1).any()
    if rows != rows + more:  # rows do not see each other
        for row in range(rows):
            alone = BlockSelector(**options)(scores[:, row : row + 1, : more + row + 1])
            if "nz_ratio" not in options:
                assert torch.equal(mask[:, row : row + 1, : more + row + 1], alone)


def test_density_is_over_the_causal_area():
    assert block_density(torch.ones(2, 4, 4, dtype=torch.bool)) == 1
    assert_close(block_density(torch.eye(4, dtype=torch.bool)), torch.tensor(0.4))
    assert_close(block_density(torch.tensor([[[1, 0, 1, 1]]]).bool()), torch.tensor(0.75))
    for refused in (block_density, BlockSelector(k=1)):
        with pytest.raises(ValueError, match="a map of 3 rows needs as many columns, got 2"):
            refused(torch.ones(3, 2))


def test_masks_carry_no_gradient_and_half_precision_works():
    scores = logits(4, 4).requires_grad_()
    assert not BlockSelector(k=1)(scores).requires_grad
    assert BlockSelector(p=0.5)(scores.bfloat16()).diagonal().all()
    compiled = torch.compile(BlockSelector(threshold=0.3), backend="eager", fullgraph=True)
    assert torch.equal(compiled(scores), BlockSelector(threshold=0.3)(scores))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of threshold, nz_ratio, token_budget, k, p, got none"),
        ({"k": 1, "p": 0.5}, "got k, p"),
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"token_budget": 63}, "token_budget must be at least one block of 64, got 63"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 1.5}, "k must be a whole number, got 1.5"),
        ({"k": 1, "dense_rows": -1}, "dense_rows must not be negative, got -1"),
        ({"k": 1, "sinks": -1}, "sinks must not be negative, got -1"),
        ({"p": 0.5, "recent": 1.5}, "recent must be a whole number, got 1.5"),
        ({"k": 2, "sinks": 2, "recent": 1}, "sinks=2 and recent=1 are 1 more than .* of k=2"),
        ({"token_budget": 128, "recent": 4}, "are 2 more than the blocks of token_budget=128"),
        ({"k": torch.tensor([3, 1]), "sinks": 1, "recent": 1}, "are 1 more than the blocks of k="),
        ({"k": torch.tensor([3, 0])}, r"k must be whole numbers \(H,\) from 1 on, got \[3, 0\]"),
    ],
)
def test_wrong_options_are_named(refuses, options, message):
    refuses(ValueError, (message, lambda: BlockSelector(**options)))
