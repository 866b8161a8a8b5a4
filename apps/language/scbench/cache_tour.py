"""One context that is asked five times, by four caches, for the tour."""

import time
from typing import NamedTuple

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from apps.language.scbench.asking import RETRIEVER, loaded
from harness.figures.style import BLUE, GRID, TEXT_SIZE, dress, head, new_figure, place
from harness.report.page import Page, TourRow, TourTask
from language.scbench.metrics import score
from language.scbench.policies.registry import policy_of
from language.scbench.prompts import conversation
from language.scbench.runner import Answering, ends_of
from language.scbench.tasks import generate

TOKENS, SEED = 2048, 0
FULL, SNAPKV, INT4 = "full", "SnapKV", "int4"
POLICIES = {
    FULL: policy_of("full"),
    "StreamingLLM": policy_of("streaming", keep=0.5),
    SNAPKV: policy_of("snapkv", keep=0.5),
    INT4: policy_of("kivi", bits=4),
}
CELL, LEFT = 0.55, 2.4  # inches of an answer, and of the name of a cache


class CachePart(NamedTuple):
    """What the tour shows of a cache that is used again.

    Attributes:
        row: Its line of the table.
        figure: Right answers by cache and turn.
        done: Its line of the table of tasks.
    """

    row: TourRow
    figure: Figure
    done: TourTask

    def draw(self, page: Page) -> None:
        """Add the answers to the page."""
        page.figure(
            self.figure,
            f"A context of {TOKENS:,} symbols is read once and asked five times, by a model that "
            "finds everything with a full cache. SnapKV keeps what the first question looks at, so "
            "later ones may miss; StreamingLLM keeps the beginning and the end; 4 bits keep all.",
            name="cache-asked-again",
        )


def cache_part() -> CachePart:
    """Ask the retriever five questions about one context, with four caches."""
    started = time.monotonic()
    found = loaded(RETRIEVER)
    (row,) = generate("kv", 1, TOKENS, SEED, found.tokenizer, "symbols")
    asked = conversation(row, found.tokenizer, "turns", max_length=found.context)
    ends = ends_of(found.model, found.tokenizer)
    hits, held = {}, {}
    for name, policy in POLICIES.items():
        answers, cost = Answering(found.model, policy, ends).answers(asked, "turns")
        texts = [found.tokenizer.decode(answer) for answer in answers]
        pairs = zip(row.turns, texts, strict=True)
        hits[name] = [score(row.task, turn, text) == 1 for turn, text in pairs]
        held[name] = cost.held_bytes
    right = {name: sum(own) for name, own in hits.items()}
    texts = [f"{name} {right[name]} ({held[name] / 1e6:.2f} MB)" for name in POLICIES]
    done = TourTask(
        "ask one context five times from a small cache",
        f"int4 answers {right[INT4]} of 5 from {held[INT4] / held[FULL]:.0%} of the bytes",
        "gates language scbench",
        time.monotonic() - started,
    )
    lasting = [name for name in POLICIES if name != FULL and right[name] == right[FULL]]
    first = hits[SNAPKV][0] and not all(hits[SNAPKV][1:])
    line = TourRow(
        "KV cache asked five times, written weights",
        f"right answers of 5, one context of {TOKENS:,} symbols",
        ", ".join(texts[1:]),
        texts[0],
        f"{', '.join(lasting) or 'none'} as full" + "; SnapKV right at first, not later" * first,
    )
    return CachePart(line, _figure(hits, held), done)


def _figure(hits: dict[str, list[bool]], held: dict[str, int]) -> Figure:
    """Draw which answers are right, a row for each cache."""
    cells = np.array([*hits.values()], dtype=float)
    rows, turns = cells.shape
    figure = new_figure(LEFT + turns * CELL + 0.4, rows * CELL + 1.5)
    axes = place(figure, LEFT, 0.5, turns * CELL, rows * CELL)
    shades = ListedColormap([GRID, BLUE])
    axes.pcolormesh(cells, cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=2)
    names = [f"{name}, {held[name] / 1e6:.2f} MB" for name in hits]
    axes.set_yticks(np.arange(rows) + 0.5, names)
    axes.set_xticks(np.arange(turns) + 0.5, [str(turn + 1) for turn in range(turns)])
    axes.invert_yaxis()
    dress(axes, x="turn", grid=False, rows=True)
    axes.tick_params(length=0, labelsize=TEXT_SIZE)
    head(figure, "Right answers", "blue: right; one context, asked five times")
    return figure
