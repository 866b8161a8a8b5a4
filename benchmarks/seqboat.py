"""SeqBoat: a layer without slots for the tokens at rest, its steps, and a model next to a decoder.

Rules in place of the gates let a quarter of the tokens attend. On one thread, without gradients.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Call, Comparison, Load

LENGTH, EARLY, LATE, LENGTHS = 8192, 1024, 16_384, (1024, 4096, 16_384)
VOCABULARY, DIM, KEY_DIM, HIDDEN, WINDOW, LAYERS = 257, 192, 64, 384, 128, 4
HEADS, KV_HEADS, DECODER_HIDDEN = 6, 2, 344  # of a decoder with as many parameters
COMPRESSED, ALL_SLOTS, DECODER, QUARTER, ALL = (
    "compressed", "all slots", "decoder", "a quarter attends", "all attend",
)  # fmt: skip
DENSITIES = {QUARTER: 0.25, ALL: 1.0}


def comparisons() -> Iterator[Comparison]:
    """The layer, its steps, and whole models."""
    yield Comparison(
        f"SeqBoat, a layer, {LENGTH} tokens", "seqboat", layers, ALL_SLOTS,
        {COMPRESSED: 1 / 1.4}, memory=1e9,
    )  # fmt: skip
    yield Comparison(
        "SeqBoat, a step of a layer", "seqboat", steps, f"after {EARLY}",
        {f"after {LATE}": 1.2}, memory=1e9,
    )  # fmt: skip
    for length in LENGTHS:
        yield Comparison(
            f"SeqBoat, whole models, {length} bytes", "seqboat", partial(whole, length=length),
            DECODER, memory=2e9,
        )  # fmt: skip


def layers(load: Load) -> dict[str, Call]:
    """Return a layer with slots for the tokens that attend, and one with a slot for each token."""
    x, calls = _tokens(LENGTH), dict[str, Call]()
    for name in (COMPRESSED, ALL_SLOTS):
        layer = models(load)[QUARTER].blocks[0]
        layer.static_shapes = name == ALL_SLOTS
        calls[name] = partial(layer, x)
    return calls


def steps(load: Load) -> dict[str, Call]:
    """Return the next step of a layer in which all tokens attend, after few of them and many."""
    layer, sma = models(load)[ALL].blocks[0], load("core_gates.attention.sma")
    token, calls = _tokens(1)[:, 0], dict[str, Call]()
    for length in (EARLY, LATE):
        _, state = sma.prefill(layer, _tokens(length))
        calls[f"after {length}"] = partial(sma.step, layer, token, state)
    return calls


def whole(load: Load, length: int) -> dict[str, Call]:
    """Return models that read bytes."""
    x = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    return {name: partial(one, x) for name, one in models(load).items()}


def models(load: Load) -> dict[str, Any]:
    """Return two models of SeqBoat, and a decoder of as many parameters."""
    torch.manual_seed(0)
    front = load("language.seqboat.front_ends").SymbolEmbedding
    made = {
        name: load("language.seqboat.sequence_model").SeqBoat(
            front(DIM, VOCABULARY), VOCABULARY, LAYERS, KEY_DIM, HIDDEN, window=WINDOW,
            causal=True, position="rotary", densities=[density] * LAYERS,
        )
        for name, density in DENSITIES.items()
    }  # fmt: skip
    made[DECODER] = load("language.decoder").Decoder(
        VOCABULARY, DIM, LAYERS, HEADS, KV_HEADS, hidden_dim=DECODER_HIDDEN, context=LENGTH,
        qk_norm=True, tie_embeddings=True,
    )  # fmt: skip
    return {name: model.eval().requires_grad_(False) for name, model in made.items()}


def _tokens(length: int) -> Tensor:
    return torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(0))
