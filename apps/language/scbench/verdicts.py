"""What answers are worth: accuracy by policy, turn and depth, its cost, and what is ranked."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.language.scbench.asking import FULL, Asking
from harness.evidence import Resamples, Row, compare, moments
from harness.evidence.rows import ALPHA
from harness.experiment import Arrays, Job, Piece, flatten
from harness.files import short_digest
from language.scbench.metrics import functions_by_repository, score
from language.scbench.prompts import Mode
from language.scbench.runner import STAGES

SCORES = "scores"
ACCURACY, UNRANKED = "accuracy", "score"  # tables are sorted by the former alone
LEAST = 0.25
LISTED = re.compile(r"^\([A-Z]\) ", re.MULTILINE)  # an option of ICL.ManyShot
BY_TURN, BY_DEPTH, BY_PART, COST = ": by turn", ": by depth", ": by part", ": cost"
DEPTHS = 5  # parts of the context
HELD, READ, PEAK = "fraction of the bytes of full", "fraction of the keys read", "more memory, MB"
VERSION = 1  # of scores
NOTE = (
    "Every policy answers the same questions. Intervals are over rows, differences from full are "
    "paired by row; full is the model with all of its cache. Of the first of several turns, the "
    "first token of the answer is decided before the cache is compressed. Bytes are those that the "
    "cache holds of the context; more memory is the most that a process took while it answered, "
    "above what it had; seconds are those of one core where there is no GPU."
)


class Verdict:
    """The scores of all policies in a task and a mode, which are computed where they are missing.

    Args:
        asking: The questions.
        task: Name of the task.
        mode: Of the questions.

    Attributes:
        title: Name of its tables.
        figures: By policy and figure: ``score`` (rows, turns), NaN where there is no turn; others
            (rows,).
    """

    def __init__(self, asking: Asking, task: str, mode: Mode) -> None:
        self.asking, self.task, self.mode = asking, task, mode
        self.contexts = asking.rows[task]
        other = " (same form, other text)" if self.contexts[0].origin == "same form" else ""
        self.title = ", ".join(filter(None, (asking.name, f"{task}{other}", mode)))
        self.figures = self._figures()

    @cached_property
    def chance(self) -> float:
        """The accuracy of guesses among options, listed ones included, or of the usual answer."""
        turns = [turn for row in self.contexts for turn in row.turns]
        options = [len(turn.options) or len(LISTED.findall(turn.input)) for turn in turns]
        usual = max(Counter(turn.answer for turn in turns).values())
        share = usual / len(turns) if usual > 1 else 0.0  # answers that never repeat say nothing
        return max(share, fmean(1 / number if number else 0.0 for number in options))

    @cached_property
    def full(self) -> Row:
        """The accuracy of full."""
        return self._rows(self._every(), ACCURACY, {FULL: self.figures[FULL]})[0]

    @cached_property
    def accuracy(self) -> list[Row]:
        """The accuracy of all policies, and if they are ranked its differences from full."""
        metric = ACCURACY if self.ranked else UNRANKED
        return self._rows(self._every(), metric, ranked=self.ranked)

    @property
    def ranked(self) -> bool:
        """Whether full is surely right often enough for policies to be compared with it."""
        return self.full.low > max(LEAST, self.chance)

    def rows(self) -> list[Row]:
        """Return accuracy and differences, accuracy by turn, depth and part, and the cost."""
        rows = [*self.accuracy]
        for kind, parts in self._parts():
            for name, mask in parts.items():
                if mask.any():
                    rows += self._rows(mask, name, task=self.title + kind)
        return [*rows, *self._cost()]

    def sentence(self) -> str:
        """Return what policies are level with full, or why nothing is ranked."""
        full, rows, of = self.full, len(self.contexts), self.figures[FULL]
        if rows == 1:
            return f"{self.title}: nothing is ranked, as one row has no interval: ask more."
        whole = f"full has {full.value:.2f} [{full.low:.2f}, {full.high:.2f}]"
        if cut := of["truncated"].sum():
            share = cut / (cut + of["tokens.prefill"].sum())
            whole += f" of contexts whose middle was left out, {share:.0%} of their tokens"
        if not self.ranked:
            return (
                f"{self.title}: nothing is ranked, as {whole}, which reaches down to"
                f" {max(LEAST, self.chance):.2f}: a model that rarely answers shows nothing of a"
                " policy."
            )
        gaps = [row for row in self.accuracy if row.versus]
        if len(gaps) * 2.0 ** (1 - rows) >= ALPHA:  # the smallest p, see `harness.evidence.compare`
            return f"{self.title}: {whole}; {rows} rows cannot show which policies are below it."
        below = {row.method for row in gaps if row.high < 0 and row.significant}
        level = [row.method for row in gaps if row.method not in below]
        said = f"{self.title}: {whole}; of {len(gaps)} policies {len(below)} are surely below it"
        if not level:
            return f"{said}."
        least = min(level, key=self.bytes_of)
        part = f"{self.bytes_of(least):.0%} of its bytes"
        return f"{said}; of the others {least} holds the least, {part}."

    def bytes_of(self, label: str) -> float:
        """Return the fraction of the bytes of full that a policy holds."""
        figures = self.figures[label]
        return float(figures["held_bytes"].sum() / figures["full_bytes"].sum())

    def entries(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return every answer with its score, and what the answers to every row took."""
        answers, costs = [], []
        for label, pieces in self.asking.pieces(self.task, self.mode).items():
            for number, (row, piece) in enumerate(zip(self.contexts, pieces, strict=True)):
                where = {"task": self.task, "mode": self.mode, "policy": label, "row": row.id}
                costs.append({**where, **self.asking.store.record(piece).facts["cost"]})
                scores = self.figures[label]["score"][number].round(6).tolist()
                texts = self.asking.store.load(piece)["answers"]
                for turn, text in enumerate(texts):
                    answer = {"prediction": text, "answer": row.turns[turn].answer}
                    answers.append({**where, "turn": turn + 1, **answer, "score": scores[turn]})
        return answers, costs

    def _figures(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the figures by policy; what is missing is asked and scored."""
        asking = self.asking
        pieces = asking.pieces(self.task, self.mode)
        digests = {label: [piece.fingerprint for piece in some] for label, some in pieces.items()}
        digest = short_digest(digests)
        of = {"of-": asking.name} if asking.name else {}
        keys = {**of, "mode-": self.mode, "answers-": digest[:8]}
        piece = Piece(self.task, keys=keys, settings={"answers": digest, "version": VERSION})
        store = asking.run.store(SCORES, Arrays())
        if store.find(piece) is None:
            asking.obtain((self.task, self.mode))
            asking.run.obtain(store, [piece], self._scored, scoring=True)
        figures: dict[str, dict[str, np.ndarray]] = {label: {} for label in pieces}
        for name, values in store.load(piece).items():
            label, _, figure = name.rpartition("|")
            figures[label][figure] = values.numpy()
        return figures

    def _scored(self, piece: Piece, job: Job) -> dict[str, Tensor]:
        """Return the figures, by ``policy|figure``."""
        del piece, job
        turns = max(len(row.turns) for row in self.contexts)
        functions = functions_by_repository(self.contexts)
        tensors: dict[str, Tensor] = {}
        for label, pieces in self.asking.pieces(self.task, self.mode).items():
            scores = torch.full((len(pieces), turns), math.nan, dtype=torch.float64)
            costs = []
            for number, (row, piece_of_row) in enumerate(zip(self.contexts, pieces, strict=True)):
                texts = self.asking.store.load(piece_of_row)["answers"]
                of_repository = functions.get(row.extra.get("repo", ""), [])
                for turn, text in enumerate(texts):
                    scores[number, turn] = score(
                        self.task, row.turns[turn], text, of_repository,
                        language=row.extra.get("lang", "python"),
                    )  # fmt: skip
                costs.append(flatten(self.asking.store.record(piece_of_row).facts["cost"]))
            tensors[f"{label}|score"] = scores
            for name in costs[0]:
                values = [math.nan if cost[name] is None else cost[name] for cost in costs]
                tensors[f"{label}|{name}"] = torch.tensor(values, dtype=torch.float64)
        return tensors

    def _every(self) -> np.ndarray:
        return np.isfinite(self.figures[FULL]["score"])

    def _rows(
        self,
        mask: np.ndarray,
        metric: str,
        figures: Mapping[str, Mapping[str, np.ndarray]] | None = None,
        *,
        task: str = "",
        ranked: bool = False,
    ) -> list[Row]:
        """Return the rows of the questions that a mask (rows, turns) selects."""
        ids = np.array([row.id for row in self.contexts])
        clusters = np.broadcast_to(ids[:, None], mask.shape)[mask]
        scores = {
            label: [moments(of["score"][mask], name=metric)]
            for label, of in (figures or self.figures).items()
        }
        return compare(scores, Resamples.clusters(clusters), task=task or self.title,
                       reference=FULL if ranked else None)  # fmt: skip

    def _parts(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Yield masks (rows, turns) of questions by turn, depth and part, by their names."""
        every = self._every()
        turns = np.arange(every.shape[1])
        depths = np.full(every.shape, math.nan)
        parts = np.full(every.shape, "", dtype=object)
        for number, row in enumerate(self.contexts):
            for turn, asked in enumerate(row.turns):
                depths[number, turn] = math.nan if asked.depth is None else asked.depth
                parts[number, turn] = asked.task or ""
        yield BY_TURN, {f"turn {turn + 1}": every & (turns == turn) for turn in turns}
        edges = np.linspace(0, 1, DEPTHS + 1)
        fifth = np.minimum(np.searchsorted(edges, depths, side="right") - 1, DEPTHS - 1)
        known = every & np.isfinite(depths)
        spans = [f"depth {edges[n]:.0%} to {edges[n + 1]:.0%}" for n in range(DEPTHS)]
        yield BY_DEPTH, {name: known & (fifth == n) for n, name in enumerate(spans)}
        names = sorted({*parts[every].tolist()} - {""})
        yield BY_PART, {f"part {name}": every & (parts == name) for name in names}

    def _cost(self) -> list[Row]:
        """Return bytes, keys, memory, and seconds and tokens a second by stage."""
        rows = []
        for label, of in self.figures.items():
            values = {"MB held": of["held_bytes"].mean() / 1e6, HELD: self.bytes_of(label)}
            values |= {READ: np.nanmean(of["read"])}
            if (peaks := of["peak_bytes"][of["peak_bytes"] > 0]).size:  # 0: nothing was sampled
                values[PEAK] = peaks.mean() / 1e6
            for stage in STAGES:
                seconds, tokens = of[f"seconds.{stage}"], of[f"tokens.{stage}"]
                values[f"{stage}, seconds"] = seconds.mean()
                if seconds.sum() > 0:
                    values[f"{stage}, tokens/s"] = tokens.sum() / seconds.sum()
            rows += [Row(label, self.title + COST, n, float(v)) for n, v in values.items()]
        return rows


def as_lines(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return entries as JSON lines, ordered by task, mode, policy, row and turn."""
    keys = ("task", "mode", "policy", "row", "turn")
    ordered = sorted(entries, key=lambda entry: [entry.get(key, 0) for key in keys])
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in ordered)
