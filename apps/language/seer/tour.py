"""What block gates of the shipped decoder choose, next to the attention itself, for the tour."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.evidence import Resamples, compare, moments
from harness.figures.style import SHARES, dress, head, new_figure, place
from harness.report.page import Page, TourRow
from language.corpus import Document
from language.hf.pretrained import open_pretrained
from language.seer.attach import BlockGate
from language.seer.attention import AttentionInputs
from language.seer.block_files import FILE, load_block_gates
from language.seer.recording import logits_of, read, record
from language.seer.rivals import (
    GATE,
    MEAN_POOL,
    ORACLE,
    RANDOM,
    SCORES,
    attention_mass,
    chosen,
    gate_scores,
    kept_mass,
)

GATES = "seer/gates/prefill-s0"  # of the weights that ship
FRACTION, CONTEXT = 0.2, 256
LEVEL = 0.005  # of the attention, the last digit that is shown
SIDE, GAP = 2.6, 0.75  # inches of a map


class BlockPart(NamedTuple):
    """What the tour shows of block gates.

    Attributes:
        row: Its line of the table.
        figure: Predicted and true maps of one head.
    """

    row: TourRow
    figure: Figure

    def draw(self, page: Page) -> None:
        """Add the maps to the page."""
        page.figure(
            self.figure,
            "One head that reads an unseen file: the largest attention in each block of 16 bytes, "
            "as the gate predicts it from pooled queries and keys, and as it is.",
            name="block-map",
        )


def block_part(
    weights: Path, gates: Path, tokenizer: Any, documents: Sequence[Document]
) -> BlockPart:
    """Let gates choose a fifth of the blocks of documents, and compare them with the attention.

    Args:
        weights: Folder of the decoder.
        gates: Folder of its gates.
        tokenizer: Its tokenizer.
        documents: Held-out documents, of which the first 256 bytes are read.
    """
    model = open_pretrained(weights, gates).model
    load_block_gates(model, gates / FILE)
    scores = {GATE: gate_scores, **{name: SCORES[name] for name in (ORACLE, RANDOM, MEAN_POOL)}}
    kept: dict[str, list[list[float]]] = {name: [] for name in scores}
    maps: dict[str, tuple[Tensor, Tensor]] = {}

    def attend(gate: BlockGate, seen: AttentionInputs) -> Tensor:
        out, own = record(gate, seen)
        mass = attention_mass(gate, seen)
        for name, found in kept.items():
            torch.manual_seed(gate.layer)  # of the random choice
            mask = chosen(scores[name](gate, seen), FRACTION)
            found[-1].append(kept_mass(mass, mask))
        maps[gate.name] = logits_of(gate.gate, own).softmax(-1)[0], own["target"][0]
        return out

    for document in documents:
        for found in kept.values():
            found.append([])
        ids = [tokenizer.end, *tokenizer.encode(document.text[:CONTEXT])][:CONTEXT]
        read(model, torch.tensor(ids), attend)
    return BlockPart(_row({name: np.mean(found, 1) for name, found in kept.items()}), _figure(maps))


def _figure(maps: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Draw the maps of the head that attends most to blocks other than its own."""
    heads = [(name, head) for name, (_, true) in maps.items() for head in range(len(true))]
    own = {one: float(maps[one[0]][1][one[1]].diagonal().mean()) for one in heads}
    name, number = min(own, key=lambda one: own[one])
    predicted, true = (one[number] for one in maps[name])
    figure = new_figure(0.7 + 2 * (SIDE + GAP), SIDE + 1.5)
    for column, (title, values) in enumerate(
        (("predicted by the gate", predicted), ("true", true))
    ):
        axes = place(figure, 0.7 + column * (SIDE + GAP), 0.6, SIDE, SIDE)
        axes.imshow(values.numpy(), SHARES, vmin=0, vmax=float(true.max()))
        dress(axes, title=title, x="block of keys", y="" if column else "block of queries",
              grid=False)  # fmt: skip
    layer = name.split(".")[1]
    head(figure, "Where a head attends", f"layer {layer}, head {number}; each row sums to 1")
    return figure


def _row(kept: dict[str, np.ndarray]) -> TourRow:
    scores = {name: moments(values, name="mass") for name, values in kept.items()}
    draws = Resamples.clusters(range(len(kept[GATE])))
    found = compare(scores, draws, task="", reference=GATE)
    own, oracle, chance, mean = found[:4]
    better = next(row.high < 0 for row in found if row.versus and row.method == RANDOM)
    verdict = "better than mean keys and random"
    if own.value - mean.value < LEVEL:
        verdict = "better than random, as mean keys are"
    if not better:
        verdict = "not distinguishable from random"
    return TourRow(
        "block gates, shipped",
        f"attention in {FRACTION:.0%} of the blocks, {own.n} unseen files",
        f"{own.value:.2f} [{own.low:.2f}, {own.high:.2f}]",
        f"oracle {oracle.value:.2f}, mean keys {mean.value:.2f}, random {chance.value:.2f}",
        verdict,
    )
