"""Rows of SCBench: a context and the turns that ask about it, as its files have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Origin = Literal["file", "exact", "same form"]
Answer = str | int | tuple[str, ...]
PREFIX = "scbench_"
"""What precedes the names of tasks in files."""


@dataclass(frozen=True)
class Task:
    """A task of SCBench.

    Attributes:
        name: Short name, without ``scbench_``.
        title: Its name in the paper.
        capability: What it asks for.
        metric: How an answer is scored; of a mix, the metric of each part.
        new_tokens: Most tokens of an answer; of a mix, for each part.
        instruction: What precedes the context.
        generated: How rows are made: ``exact``, as the official ones; in the ``same form`` with
            another text; or not at all, as people wrote the questions.
    """

    name: str
    title: str
    capability: str
    metric: str | Mapping[str, str]
    new_tokens: int | Mapping[str, int]
    instruction: str = ""
    generated: Origin | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tasks of a mix; empty for all others."""
        return () if isinstance(self.new_tokens, int) else tuple(self.new_tokens)

    def limit(self, turn: Turn) -> int:
        """Return the most tokens of the answer of a turn."""
        if isinstance(self.new_tokens, int):
            return self.new_tokens
        return self.new_tokens[turn.task or ""]


@dataclass(frozen=True)
class Turn:
    """A question about the context.

    Attributes:
        input: The question.
        answer: The right answer, as in the file; of Retr.MultiHop all names.
        options: Of En.MultiChoice, four; the answer is one of them.
        task: Of a mix, which part this is.
        depth: Where the answer is in the context, from 0 to 1; None of questions on all of it, and
            where the file does not have it.
        extra: Other fields of the file: of RepoQA ``name``, the function.
    """

    input: str
    answer: Answer
    options: tuple[str, ...] = ()
    task: str | None = None
    depth: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A context with its questions.

    Attributes:
        task: Name of the task.
        id: Number of the row, once in a file.
        context: The text; of Math.Find the list of numbers as Python prints it.
        turns: The questions, at least one.
        extra: Other fields of the file: of RepoQA ``lang`` and ``repo``, of ICL.ManyShot ``task``.
        origin: Where it comes from: a ``file``; made as the official rows are, ``exact``; or of
            the ``same form`` with another text.
        new_tokens: Most tokens of an answer, where they are fewer than the task allows.
    """

    task: str
    id: int
    context: str
    turns: tuple[Turn, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = "file"
    new_tokens: int | None = None

    def limit(self, turn: Turn) -> int:
        """Return the most tokens of the answer of a turn."""
        return self.new_tokens or TASKS[self.task].limit(turn)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "kv", "Retr.KV", "string retrieval", "substring", 150,
            "Extract the value corresponding to the specified key in the JSON object below.",
            generated="exact",
        ),
        Task(
            "prefix_suffix", "Retr.Prefix-Suffix", "string retrieval", "substring", 150,
            generated="exact",
        ),
        Task("vt", "Retr.MultiHop", "string retrieval", "names", 30, generated="exact"),
        Task(
            "repoqa", "Code.RepoQA", "semantic retrieval", "function", 1024,
            "Based on the function description and code context, please retrieve and repeat the"
            " exact described function from the code context in a code block wrapped by ```:",
            generated="same form",
        ),
        Task(
            "qa_eng", "En.QA", "semantic retrieval", "any answer", 40,
            "Read the book and answer the question. Be very concise in your answer.",
        ),
        Task(
            "qa_chn", "Zh.QA", "semantic retrieval", "character F1", 40,
            "阅读以下书籍然后回答问题。",
        ),
        Task(
            "choice_eng", "En.MultiChoice", "semantic retrieval", "choice", 40,
            "Read the book and answer the question.",
        ),
        Task(
            "many_shot", "ICL.ManyShot", "global information", "any answer", 10,
            generated="same form",
        ),
        Task("summary", "En.Sum", "global information", "ROUGE", 200),
        Task("mf", "Math.Find", "global information", "number", 5, generated="exact"),
        Task(
            "summary_with_needles", "Mix.Sum+NIAH", "multi-tasking",
            {"summary": "ROUGE", "passkey": "passkey"}, {"summary": 800, "passkey": 15},
            generated="same form",
        ),
        Task(
            "repoqa_and_kv", "Mix.RepoQA+KV", "multi-tasking",
            {"repoqa": "function", "kv": "substring"}, {"repoqa": 1024, "kv": 80},
            generated="same form",
        ),
    )
}  # fmt: skip
"""All tasks by their names: table 2 of the paper, with the limits of its program."""
