"""``evaluate --config scbench``: what policies cost where one context is asked several times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from apps.language.scbench.asking import FULL, RETRIEVER, Asking, Questions
from apps.language.scbench.benchmark import finish, model_folder
from apps.language.scbench.compression_loss import LOSS, TASK, Texts, label_of, rows_of_loss
from apps.language.scbench.verdicts import LEAST, Verdict
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.evidence import Bar, Row
from language.hf.pretrained import SMOLLM2
from language.scbench.policies.base import StreamingPolicy, kept_tokens
from language.scbench.prompts import conversation

SNAPKV, INT4 = "snapkv:keep=0.5", "kivi:bits=4"


@dataclass(frozen=True)
class ReuseBars:
    """What must be found.

    Attributes:
        least_full: Least accuracy of the retriever with its full cache; no bar if null.
        most_later: Most accuracy of SnapKV on it after turn 1, and of requests; no bar if null.
        most_lost: Most accuracy that it may lose with 4 bits; no bar if null.
        least_without: Least loss in nats per token that is added without sinks; no bar if null.
        most_with: Most loss that is added with sinks; no bar if null.
        unranked: Tasks of smollm2 that must not be ranked.
    """

    least_full: float | None = None
    most_later: float | None = None
    most_lost: float | None = None
    least_without: float | None = None
    most_with: float | None = None
    unranked: tuple[str, ...] = ()


def evaluate(
    place: Place,
    models: dict[str, Questions],
    texts: Texts,
    bars: ReuseBars,
    shipped: bool = True,
    study: Literal["scbench"] = "scbench",
    overwrite: bool = False,
) -> None:
    """Ask models several questions about each context by policies of the KV cache, and compare.

    Args:
        place: Filled in by the command line.
        models: What is asked, by model, see ``scbench``.
        texts: Filled in by the command line.
        bars: Filled in by the command line.
        shipped: Use scores that ship with the package where their settings agree.
        study: This one; ``gates language evaluate --help`` lists the others.
        overwrite: Replace what was made with other settings.
    """
    del study
    for questions in models.values():
        questions.check()
    run = place.run(package="language", shipped=shipped, overwrite=overwrite, seeds=())
    verdicts: dict[tuple[str, str, str], Verdict] = {}
    losses: list[Row] = []
    said: list[str] = []
    for model, questions in models.items():
        try:
            folder = model_folder(place, model)
        except GatesError as error:
            if model != SMOLLM2:
                raise
            said.append(f"{model} is not measured: {error}")
            continue
        asking = Asking(run, questions, folder, model)
        for task, mode in questions.asked:
            verdicts[model, task, mode] = Verdict(asking, task, mode)
        if texts.texts and model != RETRIEVER:
            losses += rows_of_loss(run, texts, folder, model)
    met = [*bars_of_retriever(verdicts, bars), *bars_of_loss(losses, texts, bars)]
    for (model, task, _), verdict in verdicts.items():
        if model == SMOLLM2 and task in bars.unranked:
            name = f"{verdict.title}: not ranked, lower end of full"
            met.append(Bar(name, verdict.full.low, "<=", LEAST))
    finish(run, [*verdicts.values()], losses, met, said)


def bars_of_retriever(
    verdicts: Mapping[tuple[str, str, str], Verdict], bars: ReuseBars
) -> list[Bar]:
    """Return the bars of the model that surely retrieves."""
    found = []
    for (model, _, mode), verdict in verdicts.items():
        scores = {label: figures["score"] for label, figures in verdict.figures.items()}
        if model != RETRIEVER:
            continue
        whole = float(scores[FULL].mean())
        if bars.least_full is not None:
            found.append(Bar(f"{verdict.title}: accuracy of full", whole, ">=", bars.least_full))
        if bars.most_later is not None and SNAPKV in scores:
            by_turn, name = scores[SNAPKV].mean(0), f"{verdict.title}: accuracy of SnapKV"
            if mode == "turns":
                found.append(Bar(f"{name}, turn 1", by_turn[0], ">=", 1.0))
                found.append(
                    Bar(f"{name}, best later turn", by_turn[1:].max(), "<=", bars.most_later)
                )
            else:
                found.append(Bar(name, by_turn.mean(), "<=", bars.most_later))
        if bars.most_lost is not None and INT4 in scores:
            lost = whole - float(scores[INT4].mean())
            found.append(
                Bar(f"{verdict.title}: accuracy lost in 4 bits", lost, "<=", bars.most_lost)
            )
        for label, policy in verdict.asking.policies.items():
            if isinstance(policy, StreamingPolicy):
                wrong = float((scores[label] != kept_answers(verdict, policy)).sum())
                name = f"{verdict.title}: answers of {label} other than those that it keeps"
                found.append(Bar(name, wrong, "<=", 0.0))
    return found


def kept_answers(verdict: Verdict, policy: StreamingPolicy) -> np.ndarray:
    """Return where (rows, turns) all tokens of the answer are among sinks and window.

    The first token of the first answer in turns is decided before the cache is compressed.
    """
    tokenizer, kept_of_row = verdict.asking.loaded.tokenizer, []
    for row in verdict.contexts:
        context = conversation(row, tokenizer, verdict.mode, max_length=None).context
        start = len(context) - kept_tokens(policy.keep, len(context)) + policy.sinks
        kept = {*range(policy.sinks), *range(start, len(context))}
        inside = []
        for number, turn in enumerate(row.turns):
            tokens = tokenizer(str(turn.answer))["input_ids"]
            place, decided = context.index(tokens[0]), number == 0 and verdict.mode == "turns"
            inside.append(kept.issuperset(range(place + decided, place + len(tokens))))
        kept_of_row.append(inside)
    return np.array(kept_of_row)


def bars_of_loss(rows: Sequence[Row], texts: Texts, bars: ReuseBars) -> list[Bar]:
    """Return the bars of the loss that StreamingLLM adds, without sinks and with the most."""
    added = {row.method: row.value for row in rows if row.versus and row.metric == LOSS}
    name, found = f"{TASK}: added by", []
    if bars.least_without is not None and (label := label_of(0)) in added:
        found.append(Bar(f"{name} {label}", added[label], ">=", bars.least_without, "nats"))
    if bars.most_with is not None and (label := label_of(max(texts.sinks))) in added:
        found.append(Bar(f"{name} {label}", added[label], "<=", bars.most_with, "nats"))
    return found
