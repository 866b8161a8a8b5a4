"""Guessing experts and keeping them: Fate next to rivals, on a trained mixture of bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apps.language.diagnose import beginnings, require_documents
from apps.language.offload.replaying import AUTO, compared
from apps.language.offload.running import offloaded, setup_text
from core_gates.errors import GatesError
from core_gates.gates.predictive import prediction_recall
from core_gates.routing.output import RoutingOutput
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Arrays, Job, Piece
from harness.files import Data, short_digest
from language.corpus import Split, read_corpus
from language.hf.pretrained import Pretrained
from language.offload.guesses import Profile
from language.offload.setup import TRANSFERS, Setup, Sizes, Transferred
from language.offload.simulation import Cost, Replayed, Times
from language.offload.traces import Step, record

CROSS, NGRAM, TABLES = "cross-layer", "ngram", ("path", "frequency")
RECALL, WALL, LOSS, PLAIN = "recall", "time over computing", "loss_increase_nats", "on-demand"
FEW, USED = (PLAIN, "static", AUTO), ("bytes", "hits", "guessed", "late")
ARRAYS = Step._fields
ALL, LATER = "over all layers", "after the first pair"
PARTS: tuple[Split, ...] = ("train", "validation", "test")
WIDTHS = (1, 1.5, 2, 3)  # guesses of which recall is measured, in experts of a token
VERSION = 4
NOTE = (
    "Time is simulated from the routing of held-out documents: every document begins with empty "
    "caches, its prompt is read at once and the rest token by token; one is the time of computing "
    "alone. Reading an expert takes as many computations of a token in a layer as the task says. "
    "Turning few bits into numbers of the model takes the time that --unpack says. "
    "All methods have the same memory, slots for guesses included. Tables are made of the same "
    "documents of the training text, and auto is chosen on validation documents, apart for INT4. "
    "Intervals are over documents; one model, one seed."
)


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Args:
        profiled: Training documents that tables are made of.
        known: Validation documents that auto is chosen on.
        held_out: Test documents.
        tokens: Tokens of a document that are read.
        prompt: Tokens of them that are read at once.
        budgets: Fractions of the experts that there is memory for.
        reads: Times that an expert takes to be read, in computations of a token in a layer.
        unpack: Time in which an expert in INT4 becomes numbers of the model again, in computations
            of a token in a layer.
    """

    profiled: int = 80
    known: int = 4
    held_out: int = 16
    tokens: int = 256
    prompt: int = 32
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75)
    reads: tuple[float, ...] = (0.25, 1.0, 4.0, 16.0)
    unpack: float = 0.1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: One makes no sense.
        """
        least = min(self.profiled, self.known, self.held_out)
        if least < 1 or not 1 <= self.prompt < self.tokens:
            raise GatesError(
                f"--profiled is {self.profiled}, --known {self.known}, --held_out {self.held_out},"
                f" --tokens {self.tokens} and --prompt {self.prompt}: expected documents, and a"
                " prompt that is not all of it"
            )
        rates = self.budgets and self.reads and min(*self.budgets, *self.reads) > 0
        if not rates or max(self.budgets) > 1 or not 0 <= self.unpack < float("inf"):
            raise GatesError(
                f"--budgets is {list(self.budgets)}, --reads {list(self.reads)} and --unpack"
                f" {self.unpack}: expected fractions up to 1, times above 0 and one from 0"
            )


def evaluate(
    place: Place,
    measured: Measured,
    model: str = "experts",
    corpus: tuple[str, ...] = ("python",),
    least_recall: float = 0.65,
    most_loss: float = 0.02,
    quick: bool = False,
    study: Literal["offload"] = "offload",
    overwrite: bool = False,
) -> None:
    """Measure how well experts are guessed, and simulate what a budget costs by every method.

    Args:
        place: Filled in by the command line.
        measured: Filled in by the command line.
        model: Folder of a mixture model, or experts, the mixture of bytes that ships.
        corpus: Files, folders, or python, of whose documents the beginnings are read.
        least_recall: Least recall of the router at the first width.
        most_loss: Most increase of the loss by INT4 in nats per token.
        quick: A quick run: two documents of each part, one budget, and no bars.
        study: This one; ``gates language evaluate --help`` lists the others.
        overwrite: Replace what was made with other settings.
    """
    del study
    if quick:
        budgets, reads = measured.budgets[:1], measured.reads[:1]
        measured = replace(measured, profiled=2, known=2, held_out=2, budgets=budgets, reads=reads)
    run = place.run(package="language", overwrite=overwrite, quick=quick, seeds=())
    cache = place.run_folder.path.parent / "cache"
    pretrained = offloaded(model, cache, budget=1.0)
    sizes: Sizes = pretrained.model.offload.sizes
    read = documents_read(pretrained, corpus, measured)
    pretrained.model.offload.close()
    tokens, names = [ids for _, some in read for ids in some], read[-1][0]
    data = [Data.of(pretrained.folder.name, "model", pretrained.folder)]
    base = {"model": data[0].sha256, "tokens": short_digest(tokens), "version": VERSION}
    base["prompt"] = measured.prompt
    store = run.store("traces", Arrays())
    work = partial(trace_of, model=model, cache=cache, tokens=tokens)
    traced = [Piece(transfer, settings=base) for transfer in TRANSFERS]
    run.obtain(store, traced, work, ticks=len(tokens), unit="documents", scoring=True)
    traces = {piece.method: store.load(piece) for piece in traced}
    splits = [len(some) for _, some in read]
    profiled, held = documents_of(traces["stored"], sizes, splits, measured.prompt)
    times = run.store("times", Arrays())
    of = {**base, "splits": splits, "unpack": measured.unpack}
    pieces = [
        Piece("times", None, {"budget": budget, "read": read}, of)
        for budget in measured.budgets for read in measured.reads
    ]  # fmt: skip
    run.obtain(times, pieces, partial(times_of, known=profiled, held=held), scoring=True)
    rows = rows_of_recall(held, names) + rows_of_loss(traces, names)
    for piece in pieces:
        rows += rows_of_times(piece, times.load(piece), names)
    bars = [] if quick else bars_of(rows, least_recall, most_loss)
    run.finish(rows, bars, seeds=(), data=data, headline=headline(rows), notes=[NOTE])


def documents_read(
    found: Pretrained, corpus: Sequence[str], measured: Measured
) -> list[tuple[list[str], list[list[int]]]]:
    """Return names and first tokens of the documents of each part."""
    found.require_context(measured.tokens)
    layers = found.model.offload.sizes.layers
    if layers < 3:
        raise GatesError(f"the model has {layers} layers of experts, expected 3 or more to compare")
    texts, read = read_corpus(corpus), []
    numbers = (measured.profiled, measured.known, measured.held_out)
    for part, most in zip(PARTS, numbers, strict=True):
        read.append(beginnings(found, texts.part(part), measured.tokens, most))
        require_documents(read[-1][1], measured.tokens)
    return read


def trace_of(
    piece: Piece, job: Job, model: str, cache: Any, tokens: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return the fields of steps of documents (N, ...), and nats per token (N,)."""
    setup = Setup(predictor="cross-layer", transfer=cast(Transferred, piece.method))
    pretrained = offloaded(model, cache, budget=2**62, setup=setup)
    traced = []
    for text in map(torch.tensor, tokens):
        step, logits = record(pretrained.model, text)
        nats = F.cross_entropy(logits[:-1].float(), text[1:])
        traced.append({**dict(zip(ARRAYS, step, strict=True)), "nats": nats})
        job.tick()
    pretrained.model.offload.close()
    return {name: torch.stack([trace[name] for trace in traced]) for name in traced[0]}


def documents_of(
    trace: Mapping[str, Tensor], sizes: Sizes, splits: Sequence[int], prompt: int
) -> tuple[list[Replayed], list[Replayed]]:
    """Return the documents that ``auto`` is chosen on and those held out, with the same tables."""
    some, profiled, held = zip(*(trace[name].split(splits) for name in ARRAYS), strict=True)
    profile = Profile(some[0].transpose(0, 1).flatten(1, 2), some[2].flatten(0, 1))

    def replayed(*arrays: Tensor) -> list[Replayed]:
        steps = zip(*arrays, strict=True)
        return [Replayed(Step(*arrays).split(prompt), sizes, profile) for arrays in steps]

    return replayed(*profiled), replayed(*held)


def times_of(
    piece: Piece, job: Job, known: Sequence[Replayed], held: Sequence[Replayed]
) -> dict[str, Tensor]:
    """Return simulated times and uses (N,) of N held-out documents, by method and figure."""
    sizes = held[0].sizes
    budget = int(piece.keys["budget"] * sizes.layers * sizes.experts)  # type: ignore[operator]
    cost = Cost(1.0, sizes.bytes / float(piece.keys["read"]), piece["unpack"])
    times_of_method, setup = compared(known, held, budget, cost)
    others, few = compared(known, held, budget, cost, "int4")
    times_of_method |= {f"{name}, INT4": others[name] for name in FEW}
    job.note(auto=setup_text(setup), auto_int4=setup_text(few))
    return {
        f"{method}/{field.name}": torch.tensor([float(getattr(o, field.name)) for o in ones])
        for method, ones in times_of_method.items() for field in fields(Times)
    }  # fmt: skip


def recall_of(document: Replayed, predictor: str, width: int) -> list[float]:
    """Return which fraction of the experts of each layer but the first is guessed."""
    routings = [
        [RoutingOutput(torch.ones(experts.shape), experts) for experts in (ranked[:, :width], used)]
        for ranked, used in zip(document.guesses(predictor), document.routed[1:], strict=True)
    ]
    return [float(prediction_recall(*routing_pair).mean()) for routing_pair in routings]


def rows_of_recall(held: Sequence[Replayed], names: Sequence[str]) -> list[Row]:
    """Return the recall of the router and of tables by width, at the first by pair of layers."""
    sizes, draws = held[0].sizes, Resamples.clusters(names)
    layers = [*range(sizes.layers - 1)]
    widths = [int(n * sizes.k) for n in WIDTHS if n * sizes.k <= sizes.experts]
    tasks = [(width, ALL, layers) for width in widths]
    tasks.append((widths[0], LATER, layers[1:]))
    tasks += [(widths[0], f"layer {n + 1} to {n + 2}", [n]) for n in layers]
    rows = []
    for width, pairs, some in tasks:
        recalls = {
            name: np.array([recall_of(document, name, width) for document in held])[:, some]
            for name in (CROSS, NGRAM, *TABLES)
        }
        scores = {
            name: [moments(method_recalls.mean(1), name=RECALL)]
            for name, method_recalls in recalls.items()
        }
        rows += compare(scores, draws, task=f"guesses, width {width}, {pairs}", reference=CROSS)
    return rows


def rows_of_loss(traces: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> list[Row]:
    """Return rows: how much transfers in few bits add to the loss of held-out documents."""
    stored = traces[TRANSFERS[0]]["nats"]
    more = {n: (traces[n]["nats"] - stored)[-len(names) :].numpy() for n in TRANSFERS[1:]}
    scores = {str(name): [moments(values, name=LOSS)] for name, values in more.items()}
    return compare(scores, Resamples.clusters(names), task="few bits")


def rows_of_times(piece: Piece, times: Mapping[str, Tensor], names: Sequence[str]) -> list[Row]:
    """Return the rows of one budget and link: time, and where it comes from."""
    budget, read = piece.keys["budget"], piece.keys["read"]
    task = f"{budget:.0%} of the experts, a read is {read:g} computations"
    methods = list(dict.fromkeys(name.partition("/")[0] for name in times))
    of = {m: {f.name: times[f"{m}/{f.name}"].numpy() for f in fields(Times)} for m in methods}
    walls = {m: [moments(v["wall"] / (v["wall"] - v["stall"]), name=WALL)] for m, v in of.items()}
    draws = Resamples.clusters(names)
    rows = compare(walls, draws, task=task, reference=AUTO)
    for name in USED:
        seconds = {method: moments(v[name] / v["uses"], name=name) for method, v in of.items()}
        rows += compare(seconds, draws, task=f"{task}, for each use of an expert")
    return rows


def bars_of(rows: Sequence[Row], least_recall: float, most_loss: float) -> list[Bar]:
    """Return the bars, from all rows."""
    of = {(r.task, r.method, r.metric): r.value for r in rows if not r.versus}
    recall_of_task = {
        task: value for (task, m, metric), value in of.items() if (m, metric) == (CROSS, RECALL)
    }
    whole = [value for task, value in recall_of_task.items() if task.endswith(ALL)]
    later = [task for task in recall_of_task if " to " in task][1:]
    leads = [recall_of_task[task] - of[task, name, RECALL] for task in later for name in TABLES]
    slower = [v / of[task, PLAIN, WALL] for (task, m, n), v in of.items() if (m, n) == (AUTO, WALL)]
    more = of["few bits", "int4", LOSS]
    return [
        Bar("mean recall at the first width", whole[0], ">=", least_recall),
        Bar("least lead over path and frequency after the first pair", min(leads), ">=", 0.0),
        Bar("least gain of recall by width", min(np.diff(whole)), ">=", 0.0),
        Bar("time of auto over on-demand, the worst", max(slower), "<=", 1.0),
        Bar("loss added by INT4", more, "<=", most_loss, "nats per token"),
    ]


def headline(rows: Sequence[Row]) -> str:
    """Return how well experts are guessed, by what, where that pays, and how much it reads."""
    comparisons = []
    for pairs in (ALL, LATER):
        some = [r for r in rows if r.metric == RECALL and r.task.endswith(pairs)]
        of = {(r.method, r.versus): r for r in reversed(some)}  # the smallest width
        router, table = (
            f"{recall.value:.1%} [{recall.low:.1%}, {recall.high:.1%}]"
            for recall in (of[CROSS, ""], of[NGRAM, ""])
        )
        lead = of[NGRAM, CROSS]
        best = "the table" if lead.low > 0 else "the router" if lead.high < 0 else "neither"
        comparisons.append(f"{router} and {table} {pairs}, {best} is better")
    gaps = [r for r in rows if r.versus == AUTO and r.metric == WALL and r.method == PLAIN]
    faster = [r for r in gaps if r.low > 0 and r.p < 0.05]
    read = {(r.task, r.method): r.value for r in rows if r.metric == "bytes"}
    more = [read[task, AUTO] / value for (task, name), value in read.items() if name == PLAIN]
    return (
        "Of the experts of the next layer, its router finds one layer early, and a table of the"
        f" last four tokens: {'; '.join(comparisons)}. Auto is faster than on-demand in"
        f" {len(faster)} of {len(gaps)} budgets and links, and reads"
        f" {min(more):.2g} to {max(more):.2g} times its bytes."
    )
