"""Scores of vertical-slash, next to its definition in loops over tokens."""

import pytest
import torch
from torch.testing import assert_close

from language.seer.attach import attach_block_gates
from language.seer.attention import attend_to_all
from language.seer.recording import read
from language.seer.rivals import SCORES, VERTICAL_SLASH, chosen, line_scores

BLOCK, LENGTH, BLOCKS = 4, 26, 7


@pytest.fixture
def seen_by(tiny, tokens):
    """The gate of each layer, and what its attention has before it."""
    model, calls = tiny().double(), []
    attach_block_gates(model, block_size=BLOCK)

    def attend(gate, seen):
        calls.append((gate, seen))
        return attend_to_all(seen)

    read(model, tokens[0], attend)
    return calls


@pytest.mark.parametrize("last", [1, 6, 64])
def test_lines_are_those_of_the_last_queries_rounded_to_blocks(last, seen_by, monkeypatch):
    monkeypatch.setattr("language.seer.rivals.LAST", last)
    number = min(last, LENGTH)
    for gate, seen in seen_by:
        found = line_scores(gate, seen)
        assert found.shape == (1, 4, BLOCKS, BLOCKS)
        for head in range(4):
            columns, diagonals = torch.zeros(2, BLOCKS + 1).double()
            for row in range(LENGTH - number, LENGTH):
                pairs = seen.k[0, head // 2, : row + 1] @ seen.q[0, head, row] * seen.scale
                for key, weight in enumerate(pairs.softmax(0) / number):
                    columns[key // BLOCK] += weight
                    for place in range(BLOCK):  # of a query in its block, as far from its key
                        diagonals[-((place - row + key) // BLOCK)] += weight / BLOCK
            for i in range(BLOCKS):
                for j in range(i + 1):
                    expected = max(columns[j], diagonals[i - j])
                    assert_close(found[0, head, i, j], expected, rtol=1e-10, atol=1e-12)


def test_the_blocks_of_the_best_lines_are_read_and_the_first_one(seen_by):
    """A head that looks three blocks back and at the second block reads both, in every row."""
    gate, seen = seen_by[0]
    far = torch.tensor([[3 * BLOCK], [0]])  # tokens that a query looks back, in two heads
    place = torch.arange(LENGTH)
    eye = 20 * torch.eye(LENGTH).double()
    looked = torch.where(far > 0, (place - far).clamp(min=0), BLOCK + 1)
    q, k = eye[looked].repeat_interleave(2, 0)[None], eye.expand(1, 2, -1, -1)
    kept = chosen(SCORES[VERTICAL_SLASH](gate, seen._replace(q=q, k=k, scale=1.0)), 0.65)[0]
    row, block = torch.arange(BLOCKS)[:, None], torch.arange(BLOCKS)
    for head, wanted in ((0, block == row - 3), (2, (block == 1) & (row > 0))):
        assert kept[head][wanted].all()
    assert kept[..., 0].all()
    assert (kept.sum(-1) == torch.arange(1, BLOCKS + 1).clamp(max=3)).all()
