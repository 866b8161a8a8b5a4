"""Attention to the blocks that gates choose, gate included, next to plain attention.

Of a prompt of 8,192 tokens and of a token after 32,768, with a tenth of the blocks, on one thread.
Gates are not trained: what they choose does not change the time, their number of blocks does.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Figure, Load
from benchmarks.language import ABSENT, is_installed

LENGTH, LONG = 8192, 32_768
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
DENSITY = 0.1
PLAIN, BLOCKS, GATE = "SDPA", "gate and a tenth of the blocks", "gate alone"
PROMPT_BARS = {64: 1 / 3.3, 128: 1 / 4.2}
GATE_BAR, STEP_BAR = 0.04, 1 / 1.5


def comparisons() -> Iterator[Comparison]:
    """A prompt in blocks of two sizes, then a step of decoding."""
    for block_size in PROMPT_BARS:
        yield prompt(block_size)
    yield step()


def prompt(block_size: int) -> Comparison:
    """Return attention of a prompt to itself."""
    density_of_run: dict[str, float] = {}

    def build(load: Load) -> Mapping[str, Call]:
        """Return the calls that are compared."""
        if not is_installed():
            q, k, v = _inputs(LENGTH, LENGTH)
            return {PLAIN: partial(_plain, q, k, v)}
        gate, seen, _ = _gated(load, "prefill", block_size, LENGTH, LENGTH)
        selector = _selected(load, gate.gate(*seen.raw()), density_of_run)
        attend = load("core_gates.ops.block_sparse_attention.op").block_sparse_attention

        def sparse() -> Tensor:
            with torch.no_grad():
                mask = gate.choose(seen, selector, None)
                out: Tensor = attend(seen.q, seen.k, seen.v, mask, block_size)
                return out

        def alone() -> Tensor:
            with torch.no_grad():
                mask: Tensor = gate.choose(seen, selector, None)
                return mask

        return {PLAIN: partial(_plain, seen.q, seen.k, seen.v), BLOCKS: sparse, GATE: alone}

    return _compared(
        f"block gates, a prompt of {LENGTH} tokens, block {block_size}", build,
        {BLOCKS: PROMPT_BARS[block_size], GATE: GATE_BAR}, density_of_run,
    )  # fmt: skip


def step(block_size: int = 64) -> Comparison:
    """Return attention of one token to a cache, whose keys were compressed before."""
    density_of_run: dict[str, float] = {}

    def build(load: Load) -> Mapping[str, Call]:
        """Return the calls that are compared."""
        if not is_installed():
            q, k, v = _inputs(1, LONG)
            return {PLAIN: partial(_plain, q, k, v)}
        gate, seen, cache = _gated(load, "decode", block_size, 1, LONG)
        keys = cache.layers[0].keys_for(gate.gate, seen, cache.table)
        selector = _selected(load, gate.gate.decode(seen.raw()[0], keys), density_of_run)
        attend = load("core_gates.ops.block_sparse_attention.op").block_sparse_attention

        def sparse() -> Tensor:
            with torch.no_grad():
                mask = gate.choose(seen, selector, cache)
                out: Tensor = attend(seen.q, seen.k, seen.v, mask, block_size)
                return out

        def alone() -> Tensor:
            with torch.no_grad():
                mask: Tensor = gate.choose(seen, selector, cache)
                return mask

        return {PLAIN: partial(_plain, seen.q, seen.k, seen.v), BLOCKS: sparse, GATE: alone}

    return _compared(
        f"block gates, a token after {LONG}, block {block_size}",
        build,
        {BLOCKS: STEP_BAR},
        density_of_run,
    )


def _compared(
    name: str, build: Any, bars: Mapping[str, float], density_of_run: dict[str, float]
) -> Comparison:
    density = Figure(lambda: 100 * density_of_run.get("density", 100.0), "%", 11.0, name="11 %")
    return Comparison(
        name=name,
        op="block_gates",
        build=build,
        baseline=PLAIN,
        bars=bars,
        absent={} if is_installed() else dict.fromkeys(bars, ABSENT),
        also={GATE: BLOCKS} if is_installed() else {},
        memory=1e9,
        figures={"realized density": density} if is_installed() else {},
    )


def _inputs(num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (1, H, Lq, D), keys and values (1, K, Lk, D)."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, num_queries, HEAD_DIM, generator=draw)
    k, v = torch.randn(2, 1, KV_HEADS, num_keys, HEAD_DIM, generator=draw).unbind()
    return q, k, v


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to everything; the queries of a key head share its keys where there is one token."""
    if q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rows = q.view(1, k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(rows, k, v).view(q.shape)


def _gated(
    load: Load, kind: str, block_size: int, num_queries: int, num_keys: int
) -> tuple[Any, Any, Any]:
    """Return a gate of the only layer of a model, what its attention sees, and the cache."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=HEADS * HEAD_DIM, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=2 * LONG,
    )  # fmt: skip
    model = LlamaModel(config)
    attach = load("language.seer.attach")
    (gate,) = attach.attach_block_gates(model, kind, block_size=block_size).values()
    positions = torch.arange(num_keys).unsqueeze(0)
    cos, sin = model.rotary_emb(torch.zeros(1), positions)
    q, k, v = _inputs(num_queries, num_keys)
    table = cos[:, -num_queries:], sin[:, -num_queries:]
    seen = load("language.seer.attention").AttentionInputs(q, k, v, HEAD_DIM**-0.5, None, table)
    cache = attach.block_cache(model)
    cache.turn((cos, sin), 1)
    return gate, seen, cache


def _selected(load: Load, logits: Tensor, density_of_run: dict[str, float]) -> Any:
    """Return the rule by which at least a tenth of the blocks is kept, own blocks included.

    Its rows keep the best blocks up to a sum of probabilities, which comes nearer to a tenth than a
    number of blocks does.
    """
    room = load("core_gates.attention.seer.decode")
    low, high = 0.0, 1.0
    for _ in range(20):
        rule = room.BlockSelector(p=(low + high) / 2, dense_rows=0)
        density = float(room.block_density(rule(logits)))
        low, high = (low, rule.value) if density >= DENSITY else (rule.value, high)
    rule = room.BlockSelector(p=high, dense_rows=0)
    density_of_run["density"] = float(room.block_density(rule(logits)))
    return rule
