"""Whether gates choose ranks: SoRA next to plain LoRAs, a cut one, and the draw of the gates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from apps.language.adapt import Adaptation, AdapterRecipe, texts_of
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, Scores, compare
from harness.experiment import Piece
from harness.files import Data
from language.adapt.label_scores import CONSTANT, constant_scores, label_scores
from language.hf.classifier import classifier_folder

SORA, DRAW, MAGNITUDE = "sora", "draw", "magnitude"
METHODS = ("head", "lora", SORA, MAGNITUDE, DRAW)
KEPT, AMONG, PARAMETERS = "kept fraction", "also kept by the draw", "parameters"
FAR = 0.25  # what a LoRA of its size may have more or less of its parameters
NOTE = (
    "Every method has the same steps, batches, seeds, head and learning rates; none is tuned. The "
    "gates of SoRA and draw have a rate, those of LoRAs are one. Magnitude cuts the plain LoRA to "
    "the size of SoRA by the norms of its factors, and is not trained again; draw trains the "
    "components alone whose gates started largest, as many as SoRA keeps; always the same is the "
    "most frequent training label, or the mean number. No LoRA has exactly the size of SoRA; the "
    "nearest counts if it is within a quarter. Intervals are over held-out rows and seeds; "
    "differences are paired."
)


@dataclass(frozen=True)
class AdapterBars:
    """What SoRA must reach.

    Attributes:
        most_below: Most accuracy that it may lose to the largest LoRA; no bar if null.
        most_kept: Largest fraction of parameters that it may keep; no bar if null.
        barred: Tasks with these bars; all if empty.
    """

    most_below: float | None = None
    most_kept: float | None = None
    barred: tuple[str, ...] = ()


def evaluate(
    place: Place,
    recipe: AdapterRecipe,
    bars: AdapterBars,
    data: str,
    tasks: tuple[str, ...],
    model: str = "minilm",
    ranks: tuple[int, ...] = (8, 4, 2),
    seeds: tuple[int, ...] = (0, 1, 2),
    quick: bool = False,
    study: Literal["adapters"] = "adapters",
    overwrite: bool = False,
) -> None:
    """Train adapters where they are missing, and compare SoRA with rivals of equal size.

    Args:
        place: Filled in by the command line.
        recipe: Filled in by the command line.
        bars: Filled in by the command line.
        data: Folder with a folder for each task, see ``adapt``.
        tasks: Names of these folders.
        model: See ``adapt``.
        ranks: Ranks of plain LoRAs.
        seeds: Seeds of every method.
        quick: A quick run: nothing is trained, and there are no bars.
        study: This one; ``gates language evaluate --help`` lists the others.
        overwrite: Replace what was made with other settings.
    """
    del study
    if (
        not len(tasks) == len({*tasks}) > 0
        or not len(seeds) == len({*seeds}) > 0
        or min(seeds) < 0
        or any(rank < 1 for rank in ranks)
    ):
        raise GatesError(
            f"--tasks is {list(tasks)}, --seeds {list(seeds)} and --ranks {list(ranks)}, expected"
            " tasks, seeds from 0, each once, and ranks from 1"
        )
    folder = classifier_folder(model)
    run = place.run(package="language", overwrite=overwrite, quick=quick, seeds=seeds)
    plain = f"lora r{max((recipe.rank, *ranks))}"  # the largest
    rows: list[Row] = []
    met: list[Bar] = []
    said: list[str] = []
    used = [Data.of(folder.name, "model", folder)]
    for task in tasks:
        texts = texts_of(str(Path(data) / task))
        made = Adaptation(run, folder, texts, recipe, task)
        pieces = made.obtain(METHODS, seeds, ranks)
        if not any(piece.method == SORA for piece in pieces):
            continue  # of a quick run
        task_rows = rows_of_task(made, pieces, task)
        rows, said = rows + task_rows, [*said, headline(task_rows, task, plain)]
        if not bars.barred or task in bars.barred:
            met += bars_of_task(task_rows, task, bars, plain)
        used.append(Data(task, "training and test", texts.digest, len(texts.train), "rows"))
    run.finish(rows, met, seeds=seeds, data=used, headline=" ".join(said), notes=[NOTE])


def rows_of_task(made: Adaptation, pieces: Sequence[Piece], task: str) -> list[Row]:
    """Return the rows of one task: sizes, scores, and differences from SoRA.

    Args:
        made: Has the texts.
        pieces: Adapters of all methods and seeds.
        task: Name of the rows.
    """
    texts = made.texts
    targets, classes = texts.targets(texts.held_out), len(texts.classes)
    scores: dict[str, list[list[Scores]]] = {CONSTANT: [constant_scores(texts)]}
    facts: dict[str, list[dict[str, float]]] = {}
    for piece, outputs in zip(pieces, made.outputs(pieces), strict=True):
        name = f"lora r{piece['rank']}" if piece.method == "lora" else piece.method
        scores.setdefault(name, []).append(label_scores(outputs, targets, classes))
        facts.setdefault(name, []).append(dict(made.store.record(piece).facts))
    draws = Resamples.clusters(range(len(texts.held_out)))
    rows = []
    for place in range(len(scores[SORA][0])):
        scores_of_task = {
            name: [seed[place] for seed in scores_of_seeds]
            for name, scores_of_seeds in scores.items()
        }
        rows += compare(scores_of_task, draws, task=task, reference=SORA)
    whole = facts[f"lora r{made.recipe.rank}"][0]["size"]
    for name, facts_of_seeds in facts.items():
        size = fmean(
            seed_facts.get("size", 0) for seed_facts in facts_of_seeds
        )  # heads of older runs noted none
        rows += [Row(name, task, PARAMETERS, size), Row(name, task, KEPT, size / whole)]
    return [*rows, Row(SORA, task, AMONG, fmean(seed_facts["drawn"] for seed_facts in facts[SORA]))]


def _value(rows: Sequence[Row], method: str, metric: str) -> float:
    return next(r.value for r in rows if (r.method, r.metric, r.versus) == (method, metric, ""))


def bars_of_task(rows: Sequence[Row], task: str, bars: AdapterBars, plain: str) -> list[Bar]:
    """Return the bars of one task, from its rows."""
    metric = rows[0].metric  # that a task is told by
    lost = _value(rows, plain, metric) - _value(rows, SORA, metric)
    measures = (
        (f"{task}: {metric} of {plain} less SoRA", lost, bars.most_below),
        (f"{task}: {KEPT} of parameters", _value(rows, SORA, KEPT), bars.most_kept),
    )
    return [Bar(name, value, "<=", most) for name, value, most in measures if most is not None]


def headline(rows: Sequence[Row], task: str, plain: str) -> str:
    """Return a sentence on SoRA's score, and whether its gates or their random start select."""
    metric = rows[0].metric  # that a task is told by
    gaps = {row.method: row for row in rows if row.versus == SORA and row.metric == metric}
    sizes = {
        r.method: r.value for r in rows if r.metric == PARAMETERS and r.method.startswith("lora")
    }
    equal = min(sizes, key=lambda name: abs(sizes[name] - _value(rows, SORA, PARAMETERS)))
    ratio = sizes[equal] / max(1.0, _value(rows, SORA, PARAMETERS))
    near = {equal: f" with {ratio:.0%} of its parameters"} if abs(ratio - 1) <= FAR else {}
    rivals = [gaps[name] for name in (DRAW, MAGNITUDE, *near) if name in gaps]
    beaten = [row.method for row in rivals if row.high < 0 and row.p < 0.05]
    verdict = f"it is above {', '.join(beaten)}" if beaten else "it is above none of them"
    selects = "the gate selects" if DRAW in beaten else "that the gate selects is not shown"
    return (
        f"{task}: SoRA keeps {_value(rows, SORA, KEPT):.0%} and has {metric}"
        f" {_value(rows, SORA, metric):.3f}, {plain} {_value(rows, plain, metric):.3f},"
        f" {CONSTANT} {_value(rows, CONSTANT, metric):.3f}; of rivals of its size"
        f" ({', '.join(row.method + near.get(row.method, '') for row in rivals)})"
        f" {verdict}, so {selects};"
        f" {_value(rows, SORA, AMONG):.0%} of its components are those of the draw."
    )
