"""``gates study evomoe``: spawned experts that anneal and harden, and rivals of equal FLOPs."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from apps.study.evomoe_figures import COLUMNS, FILE, SECONDS
from apps.study.evomoe_pieces import (
    BITS,
    COUNTS,
    LEAK,
    Routed,
    Texts,
    beginnings,
    count,
    decoder_from,
    layers_of,
    routed,
    score,
    train,
    trial,
    windows,
)
from apps.study.study_run import Flags, StudyRun, open_study
from core_gates import GateMonitor
from core_gates.errors import GatesError
from core_gates.gates.dense_to_sparse import Combine
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Arrays, Piece
from harness.files import write_json
from harness.report.sections import save_gates
from language.decoder import Decoder
from language.scoring import ratio
from studies.evomoe.methods import METHODS, Plan, Sizes, plan_of
from studies.evomoe.spawning import spawning_changes

TEXT, TRAINING, CLAIM, SPAWNING = (
    "test text", "training", "up to the last held-out loss of Switch", "spawning",
)  # fmt: skip
METRIC, UPDATES = "bits per byte", "updates"
REFERENCE, OWN = "switch", "evomoe"
FLOPS_OF_BUDGET, ACTIVE, LEAKS = "FLOPs over the budget", "active experts", "logits changed"
FRACTION = {name: f"fraction of its {name}" for name in ("FLOPs", UPDATES, SECONDS)}
FLOPS_A_SECOND = 3.5e10  # of one core, with the default sizes
SCORING_SECONDS = 5.0  # of one core, of a decoder, for the standard library
COMBINES: tuple[Combine, ...] = get_args(Combine)
TEMPERATURES, NUMBERS = (2.0, 1.0, 0.5), (8, 16)
NOTE = (
    "Every method is trained for the same FLOPs of matmuls, counted over the choices that its "
    "gates really kept, with the best of {rates} learning rates on another seed. Of every test "
    "document the first 2,000 letters are scored. {counts} are counts of bytes after one and after "
    "up to five others in all training documents, of which decoders read a part. Intervals are "
    "over test documents and seeds; spawning is that of the trained experts of {own}, unmasked."
)


def evomoe(
    place: Place,
    flags: Flags,
    sizes: Sizes,
    seeds: tuple[int, ...] = (0, 1, 2),
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    corpus: tuple[str, ...] = ("python",),
) -> None:
    """Train EvoMoE, its ablations and its rivals on bytes with equal FLOPs, and compare them.

    Args:
        place: Filled in by the command line.
        flags: Filled in by the command line.
        sizes: Filled in by the command line.
        seeds: Seeds of every method, separated by commas.
        rates: Learning rates that every method tries; one alone is taken as it is.
        corpus: Files, folders, or ``python``, the standard library.
    """
    settings, plan = sizes.settings(), plan_of(sizes)
    if not corpus or not rates or not all(0 < rate < np.inf for rate in rates):
        raise GatesError(
            f"--corpus is {list(corpus)} and --rates {list(rates)}, expected files or folders and "
            "positive learning rates"
        )
    tried = len(rates) if len(rates) > 1 else 0
    scored = len(METHODS) * len(seeds)
    trainings = scored + len(METHODS) * tried
    run = open_study(
        place, "evomoe", flags, methods=METHODS, seeds=seeds, settings=settings,
        minutes=(trainings * plan.budget / FLOPS_A_SECOND + scored * SCORING_SECONDS) / 60,
    )  # fmt: skip
    run.only += tuple(COUNTS) * bool(run.only)  # the simplest rivals always take part
    texts = Texts(corpus, str(run.folder / "cache"))
    study = _Study(run, texts, plan, seeds)
    study.obtain(study.chosen(rates))
    rows = study.text_rows() + study.training_rows() + study.claim_rows() + study.spawning_rows()
    run.finish(
        rows, bars(rows), seeds=seeds, data=study.data.digest(), headline=_headline(rows),
        notes=[NOTE.format(rates=len(rates), counts=" and ".join(COUNTS), own=OWN)],
    )  # fmt: skip


class _Trained(NamedTuple):
    """A trained decoder, its curve (20, 5), and what its gates do."""

    piece: Piece
    model: Decoder
    curve: np.ndarray
    routed: Routed | None


class _Study:
    """Decoders of all methods, trained and scored on the same text."""

    def __init__(self, run: StudyRun, texts: Texts, plan: Plan, seeds: Sequence[int]) -> None:
        self.run, self.texts, self.plan, self.seeds = run, texts, plan, seeds
        self.data = texts.read(run.settings)
        run.settings["data.digest"] = [file.sha256 for file in self.data.digest()]
        self.networks, self.scores = run.store("networks", Arrays()), run.store("scores", Arrays())
        self.found: dict[str, list[_Trained]] = {}
        self.tokens = windows(self.data, "test", self.data.context + 1)

    def updates(self, piece: Piece) -> int:
        """Return about how many updates a training has."""
        return self.plan.updates(METHODS[piece.method])

    def chosen(self, rates: Sequence[float]) -> dict[str, Mapping[str, Any]]:
        """Return the settings of every method, tuned if there are several rates."""
        settings = [{"learning_rate": rate} for rate in rates]
        if len(rates) == 1:
            return dict.fromkeys(METHODS, settings[0])
        spaces = dict.fromkeys(METHODS, settings)
        choices = self.run.tune(
            spaces, partial(trial, texts=self.texts), trials=len(rates), ticks=self.updates,
            unit=UPDATES,
        )  # fmt: skip
        return {name: choice.setting for name, choice in choices.items()}

    def obtain(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Train and score what is missing, and load every decoder."""
        pieces = [
            self.run.piece(name, seed, **method_settings)
            for name, method_settings in settings.items() for seed in self.seeds
        ]  # fmt: skip
        pieces = self.run.obtain(
            self.networks, pieces, partial(train, texts=self.texts), ticks=self.updates,
            unit=UPDATES,
        )  # fmt: skip
        work = partial(score, texts=self.texts, networks=self.networks)
        for piece in self.run.obtain(self.scores, pieces, work):
            state = self.networks.load(piece)
            seconds = self.networks.record(piece).facts["cpu"]["seconds"]
            model, curve = decoder_from(piece, state), np.c_[state["curve"].numpy(), seconds]
            seen = routed(model, self.tokens[:, :-1]) if layers_of(model) else None
            self.found.setdefault(piece.method, []).append(_Trained(piece, model, curve, seen))
        if self.found:
            self._keep()

    def _keep(self) -> None:
        """Keep curves and routings for the report."""
        first = {n: trained[0] for n, trained in self.found.items() if trained[0].routed}
        curves = {
            n: [training.curve.tolist() for training in trained]
            for n, trained in self.found.items()
        }
        kinds = {
            n: training.routed.kinds.tolist() for n, training in first.items() if training.routed
        }
        write_json(self.run.folder / FILE, {"curves": curves, "kinds": kinds})
        layers = {name: layers_of(training.model)[0] for name, training in first.items()}
        with GateMonitor(nn.ModuleDict(layers)) as monitor, torch.no_grad():
            for training in first.values():
                training.model(self.tokens[:, :-1])
        if first:
            save_gates(monitor, self.run.folder)

    def text_rows(self) -> list[Row]:
        """Return bits per byte of the test text, and differences from Switch."""
        bits = {
            name: [self.scores.load(training.piece)[BITS] for training in trained]
            for name, trained in self.found.items()
        }
        counts = [self.run.piece(name) for name in COUNTS]
        counted = self.run.obtain(self.scores, counts, partial(count, texts=self.texts))
        bits = {**{piece.method: [self.scores.load(piece)[BITS]] for piece in counted}, **bits}
        draws = Resamples.clusters([document.name for document in beginnings(self.data)[0]])
        scores = {
            name: [
                moments(bits_of_texts.numpy(), ratio, name=METRIC) for bits_of_texts in seed_bits
            ]
            for name, seed_bits in bits.items()
        }
        return compare(
            scores, draws, task=TEXT, reference=REFERENCE if REFERENCE in scores else None
        )

    def training_rows(self) -> list[Row]:
        """Return rows on each training: its cost, final loss and routing."""
        rows = []
        for name, trained in self.found.items():
            ends = [dict(zip(COLUMNS, training.curve[-1], strict=True)) for training in trained]
            seen = [training.routed for training in trained if training.routed]
            values = {
                "learning rate": [training.piece["learning_rate"] for training in trained],
                FLOPS_OF_BUDGET: [end["FLOPs"] / self.plan.budget for end in ends],
                UPDATES: [end[UPDATES] for end in ends],
                SECONDS: [end[SECONDS] for end in ends],
                "held-out bits": [end["held-out bits"] for end in ends],
                ACTIVE: [routed.active for routed in seen],
                "load CV": [routed.load_cv for routed in seen],
                LEAKS: [float(self.scores.load(training.piece)[LEAK]) for training in trained],
            }
            rows += [
                Row(name, TRAINING, metric, _furthest(metric, figures), n=len(figures))
                for metric, figures in values.items()
                if figures
            ]
        return rows

    def claim_rows(self) -> list[Row]:
        """Return after which fractions of the training of Switch methods reach its last loss."""
        rows: list[Row] = []
        for name, trained in self.found.items():
            if name == REFERENCE or REFERENCE not in self.found:
                continue
            parts = [
                [reached(training.curve, other.curve, COLUMNS.index(c)) for c in FRACTION]
                for training, other in zip(trained, self.found[REFERENCE], strict=True)
            ]
            for metric, value in zip(FRACTION.values(), np.mean(parts, 0), strict=True):
                note = "" if np.isfinite(value) else "not reached by every seed"
                rows.append(Row(name, CLAIM, metric, value, n=len(trained), note=note))
        return rows

    def spawning_rows(self) -> list[Row]:
        """Return rows: how spawning changes the loss, by kind of gate and temperature."""
        rows = []
        if OWN in self.found:
            torch.manual_seed(0)
            for number, combine, temperature in product(NUMBERS, COMBINES, TEMPERATURES):
                changes = spawning_changes(
                    self.found[OWN][0].model, self.tokens, combine=combine,
                    temperature=temperature, num_experts=number,
                )  # fmt: skip
                name = spawned(combine, temperature, number)
                rows += [Row(name, SPAWNING, mode, value) for mode, value in changes.items()]
        return rows


def spawned(combine: str, temperature: float, number: int) -> str:
    """Return the name of a way of spawning."""
    return f"{combine}, temperature {temperature:g}, {number} experts"


def _furthest(metric: str, figures: Sequence[float]) -> float:
    """Return the mean over seeds, or the worst of them where all must hold."""
    if metric == LEAKS:
        return max(figures)
    if metric == FLOPS_OF_BUDGET:
        return max(figures, key=lambda value: abs(value - 1))
    return float(np.mean(figures))


def reached(curve: np.ndarray, other: np.ndarray, column: int) -> float:
    """Return where a curve first has the last loss of another, over where that ended.

    Args:
        curve: Points, columns `COLUMNS`.
        other: Of the other method.
        column: Number of what is divided.
    """
    bits = COLUMNS.index("held-out bits")
    good = np.flatnonzero(curve[:, bits] <= other[-1, bits])
    return float(curve[good[0], column] / other[-1, column]) if len(good) else np.nan


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Return the bars of a whole study; none where a method is left out."""
    value_of = {(r.method, r.task, r.metric): r.value for r in rows if not r.versus}

    def of(task: str, metric: str, names: Sequence[str] = tuple(METHODS)) -> list[float]:
        return [value_of[n, task, metric] for n in names if (n, task, metric) in value_of]

    kept = spawned("gumbel", 2.0, 8)
    evolved = [name for name, method in METHODS.items() if method.gate == "DenseToSparseGate"]
    flops, active = of(TRAINING, FLOPS_OF_BUDGET), of(TRAINING, ACTIVE, evolved)
    counts, changed = of(TEXT, METRIC, [*COUNTS][:1]), [*of(SPAWNING, "train", [kept]),
                                                    *of(SPAWNING, "eval", [kept])]  # fmt: skip
    if not (flops and active and counts and changed):
        return []
    return [
        Bar("largest distance of FLOPs from the budget", max(abs(ratio - 1) for ratio in flops),
            "<=", 0.01),
        Bar("EvoMoE: distance of active experts from 1", max(abs(count - 1) for count in active),
            "<=", 0.0),
        Bar("logits changed by 32 appended tokens", max(of(TRAINING, LEAKS)), "<=", 1e-6),
        Bar("loss changed by spawning", max(changed), "<=", 1e-6, "nats"),
        Bar("worst method", max(of(TEXT, METRIC)), "<=", counts[0], METRIC),
    ]  # fmt: skip


def _headline(rows: Sequence[Row]) -> str:
    own_rows = [row for row in rows if row.method == OWN]
    gap = next((r for r in own_rows if (r.metric, r.versus) == (METRIC, REFERENCE)), None)
    claimed = next((row.value for row in own_rows if row.metric == FRACTION[UPDATES]), None)
    if gap is None or claimed is None:
        return ""
    when = f"after {claimed:.0%} of its updates" if np.isfinite(claimed) else "not with every seed"
    return (
        f"With equal FLOPs EvoMoE needs {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] bits "
        f"per byte next to Switch, and reaches the last held-out loss of Switch {when}."
    )
