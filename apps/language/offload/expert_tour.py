"""Which experts a sentence uses while most of them stay on disk, for the tour."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from transformers import DynamicCache

from apps.language.diagnose import beginnings
from apps.language.generate import EXPERTS
from apps.language.offload.running import offloaded
from harness.evidence import Resamples, compare, moments
from harness.figures.style import (
    BLUE,
    GRID,
    MUTED,
    ORANGE,
    SKY,
    TEXT_SIZE,
    dress,
    head,
    new_figure,
    place,
)
from harness.report.page import Page, TourRow, TourTask
from language.corpus import Document
from language.offload.guesses import RoutedTokens
from language.offload.setup import ON_DEMAND, Setup
from language.offload.simulation import Cost, Simulation, left_out
from language.offload.traces import record

SENTENCE = re.compile(r'"""([A-Z][a-z ,]{35,55}\.)')
BUDGET, READ = 0.25, 1.0  # of all experts; computations of a token in a layer that a read takes
FILES, TOKENS, PROMPT = 8, 256, 32
GUESSES = "guesses"
SETUPS = {
    GUESSES: Setup(predictor="cross-layer"),
    "on demand": ON_DEMAND,
    "static": Setup(policy="static"),
    "a table of bytes": Setup(predictor="ngram"),
}
STATES = {"there": SKY, "guessed": BLUE, "missed": ORANGE}


class ExpertPart(NamedTuple):
    """What the tour shows of experts that stay on disk.

    Attributes:
        row: Its line of the table.
        figure: Experts of a sentence, by layer.
        memory: Bytes of experts in memory, and of all.
        done: Its line of the table of tasks.
    """

    row: TourRow
    figure: Figure
    memory: tuple[int, int]
    done: TourTask

    def draw(self, page: Page) -> None:
        """Add the experts of the sentence to the page, and what they take of memory."""
        held, whole = self.memory
        page.figure(
            self.figure,
            "A language model runs while most of it stays on disk. It reads a sentence of an unseen"
            f" file: {held / 1e6:.2f} MB of its"
            f" experts are in memory, {whole / 1e6:.2f} MB on disk. Two of 16 experts of a layer"
            " are needed for a byte; one that is missed is waited for.",
            name="experts",
        )


def expert_part(documents: Sequence[Document], cache: Path) -> ExpertPart:
    """Read a sentence, and simulate the time of documents, within a quarter of the experts.

    Args:
        documents: Held-out documents.
        cache: Folder for files.
    """
    started = time.monotonic()
    found = offloaded(EXPERTS, cache, budget=BUDGET, setup=SETUPS[GUESSES])
    offload = found.model.offload
    sentence = next(one[1] for text in documents for one in SENTENCE.finditer(text.text))
    figure = _figure(sentence, uses_of(found, sentence))
    names, texts = beginnings(found, documents, TOKENS, FILES)
    budget, cost = len(offload.pool.slabs), Cost(1.0, offload.sizes.bytes / READ)
    steps = [record(found.model, torch.tensor(text))[0].split(PROMPT) for text in texts]
    known = left_out(steps, offload.sizes)
    times = {
        n: [Simulation(one, s, budget, cost).run() for one in known] for n, s in SETUPS.items()
    }
    walls = {
        n: np.array([one.wall / (one.wall - one.stall) for one in own]) for n, own in times.items()
    }
    memory = offload.pool.slabs.numel(), offload.store.nbytes
    offload.close()
    done = TourTask(
        "run a mixture model in a quarter of its memory",
        f"{memory[0] / 1e6:.2f} of {memory[1] / 1e6:.2f} MB of experts in memory",
        "gates language offload generate",
        time.monotonic() - started,
    )
    return ExpertPart(_row(walls, names), figure, memory, done)


def uses_of(found: Any, sentence: str) -> np.ndarray:
    """Return for each layer, expert and byte (L, E, T) an index into ``STATES``, NaN if unused.

    Args:
        found: The model, its caches empty.
        sentence: It is read byte by byte.
    """
    offload, tokens = found.model.offload, found.tokenizer.encode(sentence).tolist()
    uses = np.full((offload.sizes.layers, offload.sizes.experts, len(tokens)), np.nan)

    def observe(layer: int, seen: RoutedTokens) -> None:
        for expert in seen.routed.unique().tolist():
            there = expert in offload.layers[layer].cache.resident
            guessed = (layer, expert) in offload.guesses.staged
            uses[layer, expert, number] = 0 if there else 2 - guessed

    offload.observers.append(observe)
    known = DynamicCache(config=found.model.config)
    for number in range(len(tokens)):
        with torch.no_grad():
            found.model(torch.tensor([tokens[number : number + 1]]), cache=known)
    offload.observers.remove(observe)
    return uses


def _figure(sentence: str, uses: np.ndarray) -> Figure:
    layers, experts, length = uses.shape
    figure = new_figure(1.4 + 0.145 * length, 7.6)
    axes = place(figure, 0.9, 0.5, 0.145 * length, 6.0)
    values = np.ma.masked_invalid(uses.reshape(-1, length))
    axes.imshow(values, ListedColormap([*STATES.values()]), vmin=0, vmax=2, aspect="auto")
    dress(axes, x="byte", grid=False)
    axes.set_xticks(range(length), [*sentence])
    axes.set_yticks([experts * (n + 0.5) for n in range(layers)],
                    [f"layer {n + 1}" for n in range(layers)])  # fmt: skip
    axes.tick_params(length=0)
    for edge in range(1, layers):
        axes.axhline(experts * edge - 0.5, color=MUTED, linewidth=0.8)
    shares = [float((uses == n).sum() / (~np.isnan(uses)).sum()) for n in range(len(STATES))]
    named = zip(STATES.items(), shares, strict=True)
    handles = [Patch(color=color, label=f"{name} {own:.0%}") for (name, color), own in named]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(STATES),
                fontsize=TEXT_SIZE, frameon=False)  # fmt: skip
    axes.grid(True, axis="x", color=GRID, linewidth=0.3)
    head(figure, "Experts of a sentence", "16 of a layer, a row each; a quarter fits into memory")
    return figure


def _row(walls: dict[str, np.ndarray], names: Sequence[str]) -> TourRow:
    rivals = {name: values.mean() for name, values in walls.items() if name != GUESSES}
    best = min(rivals, key=rivals.__getitem__)
    scores = {name: moments(walls[name]) for name in (GUESSES, best)}
    own, _, gap = compare(scores, Resamples.clusters(names), task="", reference=best)
    better = gap.high < 0
    return TourRow(
        "experts on disk, shipped mixture",
        f"simulated time over computing, a read is one computation, {own.n} unseen files",
        f"{own.value:.2f} [{own.low:.2f}, {own.high:.2f}]",
        "the same memory: " + ", ".join(f"{name} {value:.2f}" for name, value in rivals.items()),
        f"against {best}: "
        + ("faster" if better else "slower" if gap.low > 0 else "not distinguishable"),
    )
