"""ListOps: SeqBoat next to the most frequent label, also by operator at the root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from apps.language.seqboat.activation_figure import add_picture
from apps.language.seqboat.pieces import (
    LOGITS,
    Study,
    density_rows,
    hits,
    score,
)
from harness.evidence import Resamples, Row, compare, moments
from harness.experiment import Piece
from harness.report.page import Page
from language.seqboat.listops import (
    CLOSE,
    NUMBERS,
    OPERATORS,
    SYMBOLS,
    ListOpsData,
    majority,
    majority_by_root,
    root_on_digits,
    value_of,
)

SEQBOAT, MAJORITY, BY_ROOT = "seqboat", "majority", "majority by operator"
ON_DIGITS = "operator on its digits"
ACCURACY, TASK = "accuracy", "test"
NOTE = (
    "Majority is the most frequent training label; by operator, that of the training trees with "
    "the same operator at the root. Operator on its digits is no network: it takes the operator at "
    "the root of the digits right below it, and leaves deeper ones out. Only what lies above it is "
    "learned of the tree below the root."
)


class ListOpsStudy(Study):
    """SeqBoat on trees that it has not seen, whole, by operator at the root and by depth."""

    kind, needs = ListOpsData, "listops needs trees of ListOps"

    def finish(self) -> Path:
        """Make what is missing, compare, and write ``scores.json``."""
        first, test = self.data.part("train"), self.data.part("test")
        right = {
            MAJORITY: [majority(first, test)],
            BY_ROOT: [majority_by_root(first, test)],
            ON_DIGITS: [root_on_digits(test)],
        }
        made = self.scores_of([self._piece(seed) for seed in self.seeds], score)
        if made:
            right[SEQBOAT] = [hits(one[LOGITS], test.labels) for one in made]
        rows = compare(
            {name: [moments(one, name=ACCURACY) for one in some] for name, some in right.items()},
            Resamples.clusters(test.names), task=TASK, reference=SEQBOAT if made else None,
        )  # fmt: skip
        roots = np.array([x[0] for x in test.inputs])
        deep = np.array([depth(x) for x in test.inputs])
        groups = {
            **{f"root {name[1:]}": roots == NUMBERS[name] for name in OPERATORS},
            **{f"depth {number}": deep == number for number in sorted({*deep.tolist()})},
        }
        rows += [
            Row(name, group, ACCURACY, fmean(float(one[inside].mean()) for one in some))
            for group, inside in groups.items()
            for name, some in right.items()
            if inside.any()
        ]
        rows += density_rows(SEQBOAT, made)
        return self.finish_with(rows, headline(rows), [NOTE])

    def add_to(self, page: Page) -> None:
        """Add the shortest test tree, with the tokens that attend in each layer."""
        x = min(self.data.part("test").inputs, key=len)
        symbols = [SYMBOLS[symbol - 1] for symbol in x]
        said = f"The tree is {value_of(symbols)}; found: "
        add_picture(
            page, self, self._piece(self.seeds[0]), x, symbols, "tree", "The shortest test tree.",
            lambda chances: (f"{said}{chances.argmax()}", chances.max()),
        )  # fmt: skip

    def _piece(self, seed: int) -> Piece:
        return Piece(SEQBOAT, seed, settings={**self.run.settings, "seed": seed})


def depth(x: NDArray[np.int64]) -> int:
    """Return how deep operators are nested in a tree (T,)."""
    opened = np.isin(x, [NUMBERS[name] for name in OPERATORS]).astype(int) - (x == NUMBERS[CLOSE])
    return int(opened.cumsum().max())


def headline(rows: Sequence[Row]) -> str:
    """Return a sentence on what SeqBoat has learned beyond the operator at the root."""
    value = {r.method: r.value for r in rows if r.task == TASK and not r.versus}
    gap = next((r for r in rows if r.method == BY_ROOT and r.versus == SEQBOAT), None)
    if gap is None:
        return "SeqBoat is not trained."
    learned = "more than" if gap.high < 0 and gap.p < 0.05 else "not shown to be more than"
    return (
        f"SeqBoat is right on {value[SEQBOAT]:.3f} of the trees, {learned} the most frequent label "
        f"by operator at the root, {value[BY_ROOT]:.3f}; that operator on the digits right below "
        f"it, without learning, is right on {value[ON_DIGITS]:.3f}."
    )
