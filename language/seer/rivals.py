"""What chooses blocks without learning, and what knows the answer: rivals of block gates."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.attention.seer.decode import BlockSelector, DecodeAttnGate
from core_gates.attention.seer.gate import AttnGate, mean_pool_logits, pool_blocks
from core_gates.ops import block_sparse_attention
from language.seer.attach import BlockGate
from language.seer.attention import AttentionInputs
from language.seer.budgets import causal_density
from language.seer.recording import inputs_of, logits_of, record, rows_of

GATE, ORACLE, BY_SUM = "gate", "oracle", "oracle-by-sum"
RANDOM, SINK_WINDOW, STATIC = "random", "sink-window", "static-map"
MEAN_POOL, SINK_MEAN_POOL, QUEST, SINK_QUEST = "mean-pool", "sink-mean-pool", "quest", "sink-quest"

Score = Callable[[BlockGate, AttentionInputs], Tensor]
"""Returns scores of blocks (B, H, N, N) of a prompt, or (B, K, R, N) of rows of decoding."""


def gate_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score by the gate itself."""
    return logits_of(gate.gate, inputs_of(gate, seen))


def scores_by(gate: BlockGate, seen: AttentionInputs, gates: Mapping[str, Any]) -> Tensor:
    """Score by another set of gates, the one of the same layer, such as of another seed."""
    return logits_of(gates[gate.name], inputs_of(gate, seen))


def oracle_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score by the largest attention in a block, which no method knows before it attends."""
    return record(gate, seen)[1]["target"]


def sum_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score by the attention in a block: no method holds more of it with as many blocks."""
    return _by_decision(gate, attention_mass(gate, seen))


def attention_map(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Return the attention between blocks of one sequence, (H, N, N), of decoding (K, N, N).

    Its mean over sequences is all that can be known without reading their content.
    """
    decisions = sum_scores(gate, seen)[0]
    if not isinstance(gate.gate, DecodeAttnGate):
        return decisions
    blocks, length = decisions.shape[-1], seen.q.shape[2]
    rows = rows_of(length).to(decisions.device) // gate.gate.block_size
    return decisions.new_zeros(len(decisions), blocks, blocks).index_add_(1, rows, decisions)


def static_scores(gate: BlockGate, seen: AttentionInputs, maps: Mapping[str, Tensor]) -> Tensor:
    """Score by a mean of `attention_map`, by layer: where blocks lie is all it knows."""
    found = maps[gate.name].to(seen.q.device)
    if isinstance(gate.gate, DecodeAttnGate):
        found = found[:, rows_of(seen.q.shape[2]).to(found.device) // gate.gate.block_size]
    return found.expand(len(seen.q), -1, -1, -1)


def _by_decision(gate: BlockGate, mass: Tensor) -> Tensor:
    """Average attention of all heads (B, H, R, N) over those that share a decision."""
    if not isinstance(gate.gate, DecodeAttnGate):
        return mass
    return mass.unflatten(1, (gate.gate.num_kv_heads, -1)).mean(2)


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
    """Score by the product of queries with mean keys, rotated (MoBA, arXiv 2502.13189).

    Of a prompt, the queries of a block are averaged; of decoding, those of a key head are.
    """
    q, k = seen.q.transpose(1, 2), seen.k.transpose(1, 2)
    if isinstance(gate.gate, AttnGate):
        return mean_pool_logits(q, k, gate.gate.block_size)
    keys = pool_blocks(k, gate.gate.block_size, ("avg",))
    return torch.einsum("bikd,bjkd->bkij", _groups(gate, q).mean(3), keys)


def with_first(score: Score, gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score as another method does, but the first block highest."""
    scores = score(gate, seen).clone()
    scores[..., 0] = scores.amax() + 1
    return scores


def quest_scores(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Score rows of decoding by an upper bound of their products with a block (Quest, 2406.10774).

    It is the sum over features of the larger product with the smallest and largest key; of the
    queries of a key head, the largest bound counts.
    """
    k = seen.k.transpose(1, 2)
    largest, smallest = pool_blocks(k, gate.gate.block_size, ("max", "min")).chunk(2, -1)
    queries = _groups(gate, seen.q.transpose(1, 2))  # (B, R, K, g, D)
    return page_bound(queries, smallest, largest)


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


def _groups(gate: BlockGate, q: Tensor) -> Tensor:
    """Return the queries of the rows of decoding by key head (B, R, K, g, D)."""
    rows = q[:, rows_of(q.shape[1]).to(q.device)]
    return rows.unflatten(2, (gate.gate.num_kv_heads, -1))


def _nothing(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Return scores of 0."""
    inner, length = gate.gate, seen.q.shape[2]
    blocks = -(-length // inner.block_size)
    if isinstance(inner, DecodeAttnGate):
        return seen.q.new_zeros(len(seen.q), inner.num_kv_heads, len(rows_of(length)), blocks)
    return seen.q.new_zeros(len(seen.q), inner.num_heads, blocks, blocks)


SCORES: dict[str, Score] = {
    ORACLE: oracle_scores,
    BY_SUM: sum_scores,
    RANDOM: random_scores,
    SINK_WINDOW: recent_scores,
    MEAN_POOL: mean_scores,
    SINK_MEAN_POOL: partial(with_first, mean_scores),
}
"""What learns nothing, for prompts and decoding."""

DECODE_SCORES: dict[str, Score] = {
    QUEST: quest_scores,
    SINK_QUEST: partial(with_first, quest_scores),
}


def scores_of(kind: str) -> dict[str, Score]:
    """Return the training-free scoring functions that compete with a kind of gate, by name."""
    return SCORES | (DECODE_SCORES if kind == "decode" else {})


def chosen(gate: BlockGate, scores: Tensor, fraction: float, length: int) -> Tensor:
    """Return the blocks that scores choose, as many for every method: the own block is one of them.

    Args:
        gate: Of the layer.
        scores: Of a prompt (B, H, N, N), or rows of decoding (B, K, R, N).
        fraction: Of the causal area of a prompt, as near as a number of blocks of every row comes
            to it, or of the blocks of the sequence.
        length: Tokens of the sequence.
    """
    size, blocks = gate.gate.block_size, scores.shape[-1]
    own = torch.arange(blocks, device=scores.device)
    if isinstance(gate.gate, DecodeAttnGate):
        own = rows_of(length).to(scores.device) // size
        number = max(1, int(fraction * blocks))
    else:
        number = min(range(1, blocks + 1), key=lambda k: abs(causal_density(k, blocks) - fraction))
    selector = BlockSelector(k=number, dense_rows=0)
    at = torch.arange(blocks, device=scores.device) == own[:, None]
    return selector(scores.masked_fill(at, torch.finfo(scores.dtype).max), own)


def attention_mass(gate: BlockGate, seen: AttentionInputs) -> Tensor:
    """Return the attention of all blocks, averaged over queries, which sums to 1 over a head.

    Returns:
        Of a prompt (B, H, N, N), of decoding (B, H, R, N).
    """
    size, length = gate.gate.block_size, seen.q.shape[2]
    group, tail = seen.q.shape[1] // seen.k.shape[1], -length % size
    position = torch.arange(length, device=seen.q.device)
    decodes = isinstance(gate.gate, DecodeAttnGate)
    rows = rows_of(length).to(position.device) if decodes else position
    future = position > rows[:, None]
    found = []
    for head in range(seen.q.shape[1]):  # a map of one head at a time
        scores = seen.q[:, head, rows] @ seen.k[:, head // group].mT * seen.scale
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        weights = F.pad(weights, (0, tail)).unflatten(-1, (-1, size)).sum(-1)
        if not decodes:
            weights = F.pad(weights, (0, 0, 0, tail))
            weights = weights.unflatten(1, (-1, size)).sum(2)
        found.append(weights / len(rows))
    return torch.stack(found, 1)


def attend_to(gate: BlockGate, seen: AttentionInputs, scores: Tensor, fraction: float) -> Tensor:
    """Return attention to the blocks of a prompt that scores choose."""
    size, length = gate.gate.block_size, seen.q.shape[2]
    mask = chosen(gate, scores, fraction, length)
    return block_sparse_attention(seen.q, seen.k, seen.v, mask, size, scale=seen.scale)


def kept_mass(mass: Tensor, mask: Tensor) -> float:
    """Return the attention in kept blocks, averaged over heads.

    Args:
        mass: Attention (1, H, R, N), which sums to 1 over a head.
        mask: Kept blocks (1, H or K, R, N).
    """
    mask = mask.repeat_interleave(mass.shape[1] // mask.shape[1], 1)
    return float((mass * mask).sum() / mass.shape[1])
