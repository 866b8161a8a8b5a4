"""Guessing experts and keeping them: Fate next to rivals, on a trained mixture of bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apps.language.diagnose import beginnings
from apps.language.offload.replaying import AUTO, compared, require_documents
from apps.language.offload.running import offloaded, told
from core_gates.errors import GatesError
from core_gates.gates.predictive import prediction_recall
from core_gates.routing.output import RoutingOutput
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Arrays, Job, Piece
from harness.files import Data, short_digest
from language.corpus import read_corpus
from language.offload.guesses import Seen, make_predictor
from language.offload.setup import TRANSFERS, Setup, Sizes, Transferred
from language.offload.simulation import Cost, Replayed, Simulation, Times, left_out
from language.offload.traces import RECORDED, record, steps_of

CROSS, TABLES = "cross-layer", ("path", "frequency")
RECALL, WALL, LOSS, PLAIN = "recall", "time over computing", "loss_increase_nats", "on-demand"
AUTO4 = "auto, INT4"
VERSION = 1
NOTE = (
    "Time is simulated from the routing of held-out documents: every document begins with empty "
    "caches, its prompt is read at once and the rest token by token; one is the time of computing "
    "alone. Reading an expert takes as many computations of a token in a layer as the task says. "
    "Turning few bits into numbers of the model takes the time that --unpack says. "
    "All methods have the same memory, slots for guesses included. auto is chosen, and tables are "
    "made, on other documents. Intervals are over documents; one model, one seed."
)


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Args:
        known: Validation documents that auto and tables learn from.
        held_out: Test documents.
        tokens: Tokens of a document that are read.
        prompt: Tokens of them that are read at once.
        budgets: Fractions of the experts that there is memory for.
        reads: Times that an expert takes to be read, in computations of a token in a layer.
        widths: Guesses for a token of which recall is measured, the first for the comparison.
        unpack: Time in which an expert in INT4 becomes numbers of the model again, in computations
            of a token in a layer.
    """

    known: int = 4
    held_out: int = 16
    tokens: int = 256
    prompt: int = 32
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75)
    reads: tuple[float, ...] = (0.25, 1.0, 4.0, 16.0)
    widths: tuple[int, ...] = (2, 3, 4, 6)
    unpack: float = 0.1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: One makes no sense.
        """
        if min(self.known, self.held_out) < 1 or not 1 <= self.prompt < self.tokens:
            raise GatesError(
                f"--known is {self.known}, --held_out {self.held_out}, --tokens {self.tokens} and"
                f" --prompt {self.prompt}: expected documents, and a prompt that is not all of it"
            )
        rates = self.budgets and self.reads and min(*self.budgets, *self.reads) > 0
        if not rates or max(self.budgets) > 1 or not 0 <= self.unpack < float("inf"):
            raise GatesError(
                f"--budgets is {list(self.budgets)}, --reads {list(self.reads)} and --unpack"
                f" {self.unpack}: expected fractions up to 1, times above 0 and one from 0"
            )

    def check_widths(self, sizes: Sizes) -> None:
        """Refuse widths that no guesses are recorded for.

        Raises:
            GatesError: There are less than two, or they do not rise from 1 to what is recorded.
        """
        most = min(RECORDED * sizes.k, sizes.experts)
        rising = all(one < other for one, other in pairwise(self.widths))
        if len(self.widths) < 2 or not rising or not 1 <= self.widths[0] < self.widths[-1] <= most:
            raise GatesError(
                f"--widths is {list(self.widths)}, expected two or more that rise, from 1 to {most}"
            )


def evaluate(
    place: Place,
    measured: Measured,
    model: str = "experts",
    corpus: tuple[str, ...] = ("python",),
    least_recall: float | None = None,
    most_loss: float | None = None,
    quick: bool = False,
    overwrite: bool = False,
) -> None:
    """Measure how well experts are guessed, and simulate what a budget costs by every method.

    Args:
        place: Filled in by the command line.
        measured: Filled in by the command line.
        model: Folder of a mixture model, or experts, the mixture of bytes that ships.
        corpus: Files, folders, or python, of whose documents the beginnings are read.
        least_recall: Least recall of the router at the first width; no bars if null.
        most_loss: Most increase of the loss by INT4 in nats per token; no bar if null.
        quick: A quick run: four documents, one budget, and no bars.
        overwrite: Replace what was made with other settings.
    """
    if quick:
        budgets, reads = measured.budgets[:1], measured.reads[:1]
        measured = replace(measured, known=2, held_out=2, budgets=budgets, reads=reads)
    run = place.run(package="language", overwrite=overwrite, quick=quick, seeds=())
    cache = place.run_folder.path.parent / "cache"
    found = offloaded(model, cache, budget=1.0)
    sizes: Sizes = found.model.offload.sizes
    found.require_context(measured.tokens)
    measured.check_widths(sizes)
    texts = read_corpus(corpus)
    parts = (("validation", measured.known), ("test", measured.held_out))
    read = [beginnings(found, texts.part(p), measured.tokens, n) for p, n in parts]  # type: ignore[arg-type]
    found.model.offload.close()
    require_documents(read[0][0] and read[1][0], measured.tokens)
    tokens, names = [*read[0][1], *read[1][1]], read[1][0]
    data = [Data.of(found.folder.name, "model", found.folder)]
    base = {"model": data[0].sha256, "tokens": short_digest(tokens), "version": VERSION}
    base["prompt"] = measured.prompt
    store = run.store("traces", Arrays())
    work = partial(trace_of, model=model, cache=cache, tokens=tokens, prompt=measured.prompt)
    traced = [Piece(transfer, settings=base) for transfer in TRANSFERS]
    run.obtain(store, traced, work, ticks=len(tokens), unit="documents", scoring=True)
    traces = {piece.method: store.load(piece) for piece in traced}
    known, held = documents_of(traces["stored"], sizes, len(read[0][1]), measured.prompt)
    times = run.store("times", Arrays())
    of = {**base, "known": len(known), "unpack": measured.unpack}
    pieces = [
        Piece("times", None, {"budget": budget, "read": read}, of)
        for budget in measured.budgets for read in measured.reads
    ]  # fmt: skip
    run.obtain(times, pieces, partial(times_of, known=known, held=held), scoring=True)
    rows = rows_of_recall(held, names, measured.widths) + rows_of_loss(traces, names)
    for piece in pieces:
        rows += rows_of_times(piece, times.load(piece), names)
    bars = [] if quick or least_recall is None else bars_of(rows, least_recall, most_loss)
    run.finish(rows, bars, seeds=(), data=data, headline=headline(rows), notes=[NOTE])


def trace_of(
    piece: Piece, job: Job, model: str, cache: Any, tokens: Sequence[Sequence[int]], prompt: int
) -> dict[str, Tensor]:
    """Return experts (N, L, T, K) and guesses of documents, and nats per token (N,)."""
    setup = Setup(predictor="cross-layer", transfer=cast(Transferred, piece.method))
    found = offloaded(model, cache, budget=2**62, setup=setup)
    routed, ranked, nats = [], [], []
    for text in map(torch.tensor, tokens):
        steps, logits = record(found.model, 0, text, prompt)
        routed.append(torch.cat([step.routed for step in steps], 1))
        ranked.append(torch.cat([step.ranked for step in steps], 1))
        nats.append(F.cross_entropy(logits[:-1].float(), text[1:]))
        job.tick()
    found.model.offload.close()
    return {n: torch.stack(v) for n, v in (("routed", routed), ("ranked", ranked), ("nats", nats))}


def documents_of(
    trace: Mapping[str, Tensor], sizes: Sizes, known: int, prompt: int
) -> tuple[list[Replayed], list[Replayed]]:
    """Return the documents that methods learn from, and those held out."""
    profile = list(trace["routed"][:known].transpose(0, 1).flatten(1, 2))
    steps = [
        steps_of(0, *one, prompt) for one in zip(trace["routed"], trace["ranked"], strict=True)
    ]
    held = [Replayed(one, sizes, profile) for one in steps[known:]]
    return left_out(steps[:known], sizes), held


def times_of(
    piece: Piece, job: Job, known: Sequence[Replayed], held: Sequence[Replayed]
) -> dict[str, Tensor]:
    """Return the figures of all methods (N,) by method and name."""
    sizes = held[0].sizes
    budget = int(piece.keys["budget"] * sizes.layers * sizes.experts)  # type: ignore[operator]
    cost = Cost(1.0, sizes.bytes / float(piece.keys["read"]), piece["unpack"])
    found, setup = compared(known, held, budget, cost)
    few = replace(setup, transfer="int4")
    found[AUTO4] = [Simulation(one, few, budget, cost).run() for one in held]
    job.note(auto=told(setup))
    return {
        f"{method}/{field.name}": torch.tensor([float(getattr(o, field.name)) for o in ones])
        for method, ones in found.items() for field in fields(Times)
    }  # fmt: skip


def rows_of_recall(
    held: Sequence[Replayed], names: Sequence[str], widths: Sequence[int]
) -> list[Row]:
    """Return the recall of the router by width, and of tables at the first, by pair of layers."""
    sizes, draws = held[0].sizes, Resamples.clusters(names)
    found: dict[str, np.ndarray] = {}
    for name, width in [*((CROSS, w) for w in widths), *((t, widths[0]) for t in TABLES)]:
        predict = make_predictor(
            name,
            sizes.experts,
            profile=held[0].profile,
            ahead=lambda _, seen: cast(Tensor, seen.ranked),
        )
        assert predict is not None
        recalls = []
        for one in held:
            pairs = []
            for layer in range(sizes.layers - 1):
                ranked = predict(layer, Seen(one.routed[layer], ranked=one.ranked[layer]))
                guessed, used = (
                    RoutingOutput(torch.ones(choices.shape), choices)
                    for choices in (ranked[:, :width], one.routed[layer + 1])
                )
                pairs.append(float(prediction_recall(guessed, used).mean()))
            recalls.append(pairs)
        found[f"{name}, width {width}"] = np.array(recalls)
    rows = []
    first = f"{CROSS}, width {widths[0]}"
    tasks = {"guesses, all layers": [*range(sizes.layers - 1)]}
    tasks |= {f"guesses, layer {n + 1} to {n + 2}": [n] for n in range(sizes.layers - 1)}
    for task, some in tasks.items():
        scores = {m: [moments(v[:, some].mean(1), name=RECALL)] for m, v in found.items()}
        rows += compare(scores, draws, task=task, reference=first)
    return rows


def rows_of_loss(traces: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> list[Row]:
    """Return what transfers in few bits add to the loss of held-out documents."""
    stored = traces[TRANSFERS[0]]["nats"]
    more = {n: (traces[n]["nats"] - stored)[-len(names) :].numpy() for n in TRANSFERS[1:]}
    scores = {name: [moments(values, name=LOSS)] for name, values in more.items()}
    return compare(scores, Resamples.clusters(names), task="few bits")


def rows_of_times(piece: Piece, times: Mapping[str, Tensor], names: Sequence[str]) -> list[Row]:
    """Return the rows of one budget and link: time, and where it comes from."""
    budget, read = piece.keys["budget"], piece.keys["read"]
    task = f"{budget:.0%} of the experts, a read is {read:g} computations"
    methods = list(dict.fromkeys(name.partition("/")[0] for name in times))
    of = {m: {f.name: times[f"{m}/{f.name}"].numpy() for f in fields(Times)} for m in methods}
    walls = {m: [moments(v["wall"] / (v["wall"] - v["stall"]), name=WALL)] for m, v in of.items()}
    rows = compare(walls, Resamples.clusters(names), task=task, reference=AUTO)
    for method, values in of.items():
        uses, shown = values["uses"].sum(), task + ", uses of experts"
        rows.append(Row(method, shown, "KB read per use", values["bytes"].sum() / uses / 1e3))
        for name in ("hits", "guessed", "late"):
            rows.append(Row(method, shown, name, float(values[name].sum() / uses)))
    return rows


def bars_of(rows: Sequence[Row], least_recall: float, most_loss: float | None) -> list[Bar]:
    """Return the bars, from all rows."""
    of = {(r.task, r.method, r.metric): r.value for r in rows if not r.versus}
    recalls = {(task, m): v for (task, m, metric), v in of.items() if metric == RECALL}
    whole = [
        v for (task, m), v in recalls.items() if task.endswith("all layers") and m.startswith(CROSS)
    ]
    later = sorted({task for task, _ in recalls if " to " in task})[1:]
    leads = [
        min(v - own for (t, m), own in recalls.items() if t == task and m.startswith(TABLES))
        for task in later
        for v in [next(v for (t, m), v in recalls.items() if t == task and m.startswith(CROSS))]
    ]
    slower = [v / of[task, PLAIN, WALL] for (task, m, n), v in of.items() if (m, n) == (AUTO, WALL)]
    bars = [
        Bar("mean recall at the first width", whole[0], ">=", least_recall),
        Bar("least lead over path and frequency after the first pair", min(leads), ">=", 0.0),
        Bar("least gain of recall by width", min(np.diff(whole)), ">=", 0.0),
        Bar("time of auto over on-demand, the worst", max(slower), "<=", 1.0),
    ]
    if most_loss is not None:
        more = of["few bits", "int4", LOSS]
        bars.append(Bar("loss added by INT4", more, "<=", most_loss, "nats per token"))
    return bars


def headline(rows: Sequence[Row]) -> str:
    """Return how well experts are guessed, and where that pays."""
    own = next(r for r in rows if r.metric == RECALL and not r.versus)
    gaps = [r for r in rows if r.versus == AUTO and r.metric == WALL and r.method == PLAIN]
    faster = [r for r in gaps if r.low > 0 and r.p < 0.05]
    return (
        f"The router of the next layer finds {own.value:.1%} of its experts"
        f" [{own.low:.1%}, {own.high:.1%}] one layer early; auto is faster than on-demand in"
        f" {len(faster)} of {len(gaps)} budgets and links."
    )
