"""What chooses blocks without learning, and what knows the answer: rivals of block gates."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.attention.seer.decode import BlockSelector
from core_gates.attention.seer.gate import mean_pool_logits
from language.seer.attach import BlockGate
from language.seer.attention import AttentionInputs
from language.seer.budgets import causal_density
from language.seer.recording import inputs_of, logits_of, record

GATE, ORACLE, BY_SUM = "gate", "oracle", "oracle-by-sum"
RANDOM, SINK_WINDOW = "random", "sink-window"
MEAN_POOL, SINK_MEAN_POOL = "mean-pool", "sink-mean-pool"
VERTICAL_SLASH = "vertical-slash"
LAST = 64  # queries of a prompt that vertical-slash looks at, as MInference does

Score = Callable[[BlockGate, AttentionInputs], Tensor]
"""Returns scores of blocks (B, H, N, N) of a prompt."""


def gate_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score by the gate itself."""
    return logits_of(gate.gate, inputs_of(gate, seen))


def scores_by(gate: BlockGate, seen: AttentionInputs, gates: Mapping[str, Any]) -> Tensor:
    """Score by another set of gates, the one of the same layer, such as of another seed."""
    return logits_of(gates[gate.name], inputs_of(gate, seen))


def oracle_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score by the largest attention in a block, which no method knows before it attends."""
    return record(gate, seen)[1]["target"]


def attention_mass(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Return the attention of all blocks (B, H, N, N) of a prompt, which sums to 1 over a head."""
    size, length = gate.gate.block_size, seen.q.shape[2]
    group, tail = seen.q.shape[1] // seen.k.shape[1], -length % size
    future = torch.ones(length, length, dtype=torch.bool, device=seen.q.device).triu(1)
    found = []
    for head in range(seen.q.shape[1]):  # a map of one head at a time
        scores = seen.q[:, head] @ seen.k[:, head // group].mT * seen.scale
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        weights = F.pad(weights, (0, tail, 0, tail)).unflatten(-1, (-1, size)).sum(-1)
        found.append(weights.unflatten(1, (-1, size)).sum(2) / length)
    return torch.stack(found, 1)


def random_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score at random, from the generator of torch."""
    return torch.rand_like(_nothing(gate, seen))


def recent_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score the first block highest, then the last ones (StreamingLLM, arXiv 2309.17453)."""
    scores = _nothing(gate, seen)
    scores = scores + torch.arange(scores.shape[-1], device=scores.device)
    scores[..., 0] = scores.shape[-1]
    return scores


def mean_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score by the product of mean queries and mean keys, rotated (MoBA, arXiv 2502.13189)."""
    return mean_pool_logits(seen.q.transpose(1, 2), seen.k.transpose(1, 2), gate.gate.block_size)


def line_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score by the columns and diagonals that the last queries attend to (MInference, 2407.02490).

    A column of blocks has the attention of the last queries to its tokens. A diagonal of blocks has
    that of all diagonals of tokens, as far as they cross it: by the fraction of queries whose key,
    so many tokens back, lies so many blocks back. A block has the larger of both, so that the best
    blocks of a row are those of the best columns and diagonals.
    """
    size, length = gate.gate.block_size, seen.q.shape[2]
    keys = seen.k.repeat_interleave(seen.q.shape[1] // seen.k.shape[1], 1)
    place = torch.arange(length, device=keys.device)
    back = place[-LAST:, None] - place
    weights = (seen.q[:, :, -LAST:] @ keys.mT * seen.scale).masked_fill(back < 0, -torch.inf)
    weights = weights.softmax(-1) / len(back)
    columns = F.pad(weights.sum(2), (0, -length % size)).unflatten(-1, (-1, size)).sum(-1)
    by_token = torch.zeros_like(weights[:, :, 0])
    by_token.index_add_(-1, back.clamp(min=0).flatten(), weights.flatten(2))  # the future has 0
    block = torch.arange(columns.shape[-1], device=keys.device)
    crossed = (1 - (place[:, None] / size - block).abs()).clamp(min=0)
    diagonals = by_token @ crossed.to(by_token.dtype)
    distance = (block[:, None] - block).clamp(min=0)
    return torch.maximum(columns[:, :, None], diagonals[:, :, distance])


def with_first(score: Score, gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score as another method does, but the first block highest."""
    scores = score(gate, seen).clone()
    scores[..., 0] = scores.amax() + 1
    return scores


def page_bound(queries: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    """Return the bound of Quest (B, K, R, N) of queries (B, R, K, g, D) and N blocks of keys.

    Args:
        queries: Queries by key head.
        smallest: The smallest of each feature of the keys of a block (B, N, K, D).
        largest: The largest.
    """
    up, down = queries.clamp(min=0), queries.clamp(max=0)
    bound = torch.einsum("bikgd,bjkd->bkgij", up, largest)
    bound = bound + torch.einsum("bikgd,bjkd->bkgij", down, smallest)
    return bound.amax(2)


def _nothing(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Return scores of 0."""
    blocks = -(-seen.q.shape[2] // gate.gate.block_size)
    return seen.q.new_zeros(*seen.q.shape[:2], blocks, blocks)


SCORES: dict[str, Score] = {
    ORACLE: oracle_scores,
    BY_SUM: attention_mass,  # no method holds more of it with as many blocks
    RANDOM: random_scores,
    SINK_WINDOW: recent_scores,
    MEAN_POOL: mean_scores,
    SINK_MEAN_POOL: partial(with_first, mean_scores),
    VERTICAL_SLASH: partial(with_first, line_scores),
}
"""What learns nothing."""


def chosen(scores: Tensor, fraction: float) -> Tensor:
    """Return the blocks that scores choose, as many for every method: the own block is one of them.

    Args:
        scores: Of a prompt (B, H, N, N).
        fraction: Of the causal area, as near as a number of blocks of every row comes to it.
    """
    blocks = scores.shape[-1]
    number = min(range(1, blocks + 1), key=lambda k: abs(causal_density(k, blocks) - fraction))
    mask: Tensor = BlockSelector(k=number, recent=1, dense_rows=0)(scores)
    return mask


def kept_mass(mass: Tensor, mask: Tensor) -> float:
    """Return the attention in kept blocks, averaged over heads.

    Args:
        mass: Attention (1, H, N, N), which sums to 1 over a head.
        mask: Kept blocks (1, H, N, N).
    """
    return float((mass * mask).sum() / mass.shape[1])
