"""The page of a run, section by section, gates included; the same for all domains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from core_gates import GateMonitor
from core_gates.errors import GatesError
from harness.evidence import smaller_is_better
from harness.evidence.rows import Row
from harness.experiment import Choice, Figures, Run
from harness.experiment.run import CHOICES, TRIALS
from harness.experiment.scores import Scores, number, read_scores, spelled, verdict
from harness.figures import (
    Curve,
    Tried,
    bar_panels,
    differences_figure,
    learning_figure,
    limits_figure,
    panel_grid,
    read_metrics,
    trials_figure,
)
from harness.figures.curves import numeric_settings
from harness.figures.style import SHARES
from harness.files.atomic import write_json
from harness.files.piece import RECORD, Piece, Record, Setting, read_record
from harness.report.page import UNITS, Page
from harness.runs.terminal import working

FILE = "gates.json"
VALUE_COLUMNS = ("mean", "std", "zero", "closed", "open", "non_finite")
ROUTING_COLUMNS = (
    "active", "load_cv", "load_max_violation", "load_entropy", "entropy", "dead", "unrouted",
    "dropped", "churn", "coactivation", "non_finite",
)  # fmt: skip
EXPERT_COLUMNS = ("zero_rate", "near_zero_rate", "zero_rate_max", "std_ratio", "non_finite")


def save_gates(monitor: GateMonitor, folder: Path) -> Path:
    """Keep what a monitor measured in the run folder."""
    report = monitor.report()
    experts = {
        name: {part: counts.tolist() for part, counts in parts.items()}
        for name, parts in report.distributions.items()
    }
    histograms = {
        name: parts.pop("histogram") for name, parts in experts.items() if "histogram" in parts
    }
    content = {"figures": report.figures, "histograms": histograms, "experts": experts}
    return write_json(folder / FILE, content)


def read_gates(path: Path) -> dict[str, Any]:
    """Read what `save_gates` kept.

    Raises:
        GatesError: The file is damaged.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(kept[part], dict) for part in ("figures", "histograms", "experts")):
            raise ValueError("no figures of gates")
        return dict(kept)
    except (ValueError, KeyError, TypeError) as error:
        raise GatesError(f"{path} is damaged ({error}): write the scores again") from error


def gate_section(page: Page, folder: Path, explanation: str) -> None:
    """Add tables and figures of the gates, if `save_gates` kept any.

    Args:
        page: The report.
        folder: The run folder.
        explanation: What was measured.

    Raises:
        GatesError: What was kept is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return
    kept = read_gates(path)
    values, routings, experts = (
        {name: figures for name, figures in kept["figures"].items() if mark in figures}
        for mark in ("mean", "active", "zero_rate")
    )
    if not (values or routings or experts):
        return
    histograms = kept["histograms"]
    page.section("Gates").text(explanation)
    if values:
        _table(page, values, VALUE_COLUMNS)
        page.figure(
            histogram_figure({name: histograms[name] for name in values}),
            "Histogram of the values of every gate: 0, closed, at the left; 1, open, at the right.",
            name="gate_values",
        )
    if routings:
        _add_routings(page, routings, kept)
    if experts:
        _table(page, experts, EXPERT_COLUMNS)


def histogram_figure(histograms: dict[str, list[float]]) -> Figure:
    """Draw counts over [0, 1], one panel per gate."""
    return bar_panels(histograms, span=(0, 1))


def load_figure(loads: dict[str, list[float]]) -> Figure:
    """Draw the load of every expert, one panel per gate; the line is an even load."""
    totals = {name: sum(load) or 1 for name, load in loads.items()}
    shares = {name: [count / totals[name] for count in load] for name, load in loads.items()}
    return bar_panels(shares, lines={name: 1 / len(load) for name, load in loads.items()})


def coactivation_figure(tables: dict[str, list[list[float]]]) -> Figure:
    """Draw how often an expert (column) works with another (row), one panel per gate."""
    figure, panels = panel_grid(list(tables))
    for axis, table in zip(panels, tables.values(), strict=True):
        shares = [[count / (row[i] or 1) for count in row] for i, row in enumerate(table)]
        axis.imshow(shares, cmap=SHARES, vmin=0, vmax=1, interpolation="nearest")
        axis.spines[["bottom"]].set_visible(False)
        axis.set_xticks([])
    return figure


def _add_routings(page: Page, routings: dict[str, dict[str, Any]], kept: dict[str, Any]) -> None:
    _table(page, routings, ROUTING_COLUMNS)
    page.figure(
        load_figure({name: kept["experts"][name]["load"] for name in routings}),
        "Fraction of the tokens that each expert gets; the line is an even load.",
        name="expert_shares",
    )
    page.figure(
        histogram_figure({name: kept["histograms"][name] for name in routings}),
        "Distribution of the routed weights, from 0 to 1.",
        name="routed_weights",
    )
    pairs = {
        name: kept["experts"][name]["coactivation"]
        for name, loads in routings.items()
        if "coactivation" in kept["experts"][name] and loads["active"] > 1
    }
    if pairs:
        page.figure(
            coactivation_figure(pairs),
            "Experts that work together: tokens that use both, over those of the row.",
            name="experts_together",
        )


def _table(page: Page, gates: dict[str, dict[str, Any]], columns: Sequence[str]) -> None:
    """Add the columns that any gate has."""
    shown = [column for column in columns if any(column in values for values in gates.values())]
    rows = [[name, *(values.get(column, "") for column in shown)] for name, values in gates.items()]
    page.table(["gate", *shown], rows)


EXPLANATION = """
Every method got as many trials. A value **at an edge** lies within 5 % of an edge of what was
searched, so the optimum may lie beyond.
"""


def add_tuning(
    page: Page, run: Run, own: Mapping[str, Setting] | None = None, *, score: str = "score"
) -> None:
    """Add the choices of a run, or those that ship with its configuration, with their trials.

    Args:
        page: The report.
        run: The run.
        own: See `found_choices`.
        score: What trials are judged by; after a comma, which way it is better.

    Raises:
        GatesError: A choice is damaged.
    """
    choices = found_choices(run, own)
    if not choices:
        return
    page.section("Tuning").text(EXPLANATION)
    names = list(dict.fromkeys(name for choice in choices.values() for name in choice.setting))
    rows = []
    for method, choice in choices.items():
        scores = [_score(trial) for trial in choice.trials]
        least = min((s for s in scores if not math.isnan(s)), default=math.nan)
        cells = [_cell(choice, name) for name in names]
        rows.append([method, *cells, len(choice.trials), least])
    page.table(["method", *names, "trials", "lowest score"], rows, "What was chosen")
    tried = {method: Tried(choice.trials, choice.setting) for method, choice in choices.items()}
    if numeric_settings(tried):
        page.figure(
            trials_figure(tried, score=score),
            "Every trial of every method.",
            name="trials",
            table=_score_table(choices),
        )


def found_choices(run: Run, own: Mapping[str, Setting] | None = None) -> dict[str, Choice]:
    """Return tuned choices by method: of the run folder, else of the package if settings agree.

    Args:
        run: The run.
        own: Settings of a method, by its name, that differ from those of the run, such as its
            network.

    Raises:
        GatesError: A choice is damaged.
    """
    store = run.store(CHOICES, Figures())
    choices: dict[str, Choice] = {}
    for folder in (store.folder, *store.read_only):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            record = read_record(path)
            if record is None or path.name.startswith("."):
                continue
            if folder == store.folder or _agrees(record, run, own or {}):
                choices.setdefault(_name(record), _choice(path))
    return choices


def _agrees(record: Record, run: Run, settings_of: Mapping[str, Setting]) -> bool:
    """Return whether a choice has no setting that is another one for its method in this run."""
    method = str(record.identity.get("method"))
    settings = Piece("", settings={**run.settings, **settings_of.get(method, {})}).settings
    return all(record.settings.get(name, value) == value for name, value in settings.items())


def _name(record: Record) -> str:
    task = (record.identity.get("keys") or {}).get("task-")
    method = str(record.identity.get("method"))
    return f"{method}@{task}" if task else method


def _choice(folder: Path) -> Choice:
    try:
        return Choice(**Figures().load(folder))
    except TypeError as error:
        raise GatesError(f"{folder} holds no choice: delete it and run `tune` again") from error


def _cell(choice: Choice, name: str) -> Any:
    value = choice.setting.get(name)
    text = number(value) if isinstance(value, float) else value
    return f"{text}, at an edge" if name in choice.edges else text


def _score(trial: Any) -> float:
    score = trial.get("score")
    return math.nan if score is None else float(score)


def _score_table(choices: dict[str, Choice]) -> tuple[list[str], list[list[Any]]]:
    every = [(method, trial) for method, choice in choices.items() for trial in choice.trials]
    names = list(dict.fromkeys(name for _, trial in every for name in trial))
    chosen = {method: choice.setting for method, choice in choices.items()}
    rows = [
        [method, *(trial.get(name) for name in names),
         all(trial.get(n) == value for n, value in chosen[method].items())]
        for method, trial in every
    ]  # fmt: skip
    return ["method", *names, "chosen"], rows


MOST_PANELS = 3  # metrics that share a figure
MOST_VALUES = 4  # of a setting
SHORT = 12  # digits of a hash
RESULTS = ("results", "method", "number", "seconds", "origin", "revision")
GATES = "What every gate did when it was last scored."
UNSCORED = " No score is based on what fit trained; config.yaml has its settings."


def run_page(
    run: Run,
    draw: Callable[[Page], None] | None = None,
    *,
    first: Callable[[Page], None] | None = None,
    metrics: Collection[str] = (),
    own: Mapping[str, Setting] | None = None,
    units: str = UNITS,
    score: str = "score",
    others: Sequence[Path] = (),
    unscored: str = "",
) -> Page:
    """Return the page of a run.

    Args:
        run: The run.
        draw: Adds what only the domain can show, between the scores and the gates; nothing if None.
        first: Adds what is to be seen at once, such as images, above the scores; nothing if None.
        metrics: Those of tables and figures; all when empty.
        own: Settings of a method, by its name, that differ from those of the run.
        units: What intervals are drawn from.
        score: What trials are judged by; after a comma, which way it is better.
        others: Folders of other runs, whose results the scores are based on, too.
        unscored: Method that `fit` trains in this folder and no score is based on; none if empty.

    Raises:
        GatesError: There are no scores yet, or a file of the run folder is damaged.
    """
    scores = read_scores(run.scores, run.app, run.verb)
    title = f"{run.app.capitalize()}: {run.folder.name}"
    page = Page(title, scores.headline or verdict(scores.bars))
    if scores.quick:
        page.text("**A quick run**: small samples, nothing trained for it, no bars.")
    for note in scores.notes:
        page.text(note)
    if first is not None:
        first(page)
    with working("drawing scores"):
        add_scores(page, scores, metrics, units)
    if draw is not None:
        draw(page)
    with working("drawing gates, curves and trials"):
        gate_section(page, run.folder, GATES)
        add_curves(page, run.folder, UNSCORED * bool(unscored))
        add_tuning(page, run, own, score=score)
    add_data(page, run, scores, others, unscored)
    return page


def add_scores(
    page: Page, scores: Scores, metrics: Collection[str] = (), units: str = UNITS
) -> None:
    """Add bars, a table for each task, and the differences from a reference."""
    rows = [row for row in scores.rows if not metrics or row.metric in metrics or row.note]
    page.section("Scores").scores(scores._replace(rows=rows), units=units)
    if measured := [bar for bar in scores.bars if bar.met is not None]:
        page.figure(
            limits_figure(measured),
            "By which fraction of its limit every figure meets or misses it.",
            name="bars",
            table=(
                ("name", "value", "sense", "bar", "unit", "met"),
                [[bar.name, bar.value, bar.sense, bar.bar, bar.unit, bar.met] for bar in measured],
            ),
        )
    add_differences(page, rows, units)


def add_differences(page: Page, rows: Sequence[Row], units: str = UNITS) -> None:
    """Add forest plots of the paired differences, if there are any; metrics of the same tasks."""
    compared = [row for row in rows if row.versus and math.isfinite(row.value)]
    tasks: dict[str, dict[str, None]] = {}
    for row in compared:
        tasks.setdefault(row.metric, {})[row.task] = None
    groups: dict[tuple[str, ...], list[str]] = {}
    for metric, of in tasks.items():
        groups.setdefault(tuple(of), []).append(metric)
    for metrics in groups.values():
        for start in range(0, len(metrics), MOST_PANELS):
            shown = metrics[start : start + MOST_PANELS]
            page.figure(
                differences_figure(
                    [row._replace(metric=spelled(row.metric)) for row in compared],
                    metrics=[spelled(metric) for metric in shown],
                    sides={spelled(metric): smaller_is_better(metric) for metric in shown},
                    units=units,
                    title=f"Paired differences: {'; '.join(map(spelled, shown))}",
                ),
                "Every method minus the one that it is compared with, on the same samples.",
                name="differences",
                table=(Row._fields, [row for row in compared if row.metric in shown]),
            )


def add_curves(page: Page, folder: Path, note: str = "") -> None:
    """Add what the training runs of a folder logged, if they did, and a note on it.

    Raises:
        GatesError: A log is damaged.
    """
    runs = read_curves(folder)
    if not runs:
        return
    named = runs if len(runs) > 1 else {"": next(iter(runs.values()))}
    rows = [
        [name, metric, step, value]
        for name, curves in runs.items()
        for metric, curve in curves.items()
        for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
    ]
    page.section("Learning curves").figure(
        learning_figure({name: [curves] for name, curves in named.items()}),
        f"Logged by {', '.join(runs)}.{note}",
        table=(("training", "metric", "step", "value"), rows),
    )


def add_data(
    page: Page, run: Run, scores: Scores, others: Sequence[Path] = (), unscored: str = ""
) -> None:
    """Add what the figures rest on: data, seeds, results and the settings that they have."""
    page.section("Data and settings")
    if scores.data:
        rows = [
            [source.name, source.role, f"{source.size} {source.unit}", source.sha256[:SHORT],
             "names and sizes" if source.listing else "content"]
            for source in scores.data
        ]  # fmt: skip
        page.table(["data", "role", "size", "SHA-256", "of"], rows)
    seeds = ", ".join(map(str, scores.seeds)) or "none"
    page.text(f"Configuration `{run.config}`, seeds {seeds}.")
    results = _results(run.folder)
    if results:
        page.table(RESULTS, _groups(results), "What was made in this run folder")
    for folder in others:
        if groups := _results(folder):
            caption = f"What was made in the run folder {folder.name}, which is used here"
            page.table(RESULTS, _groups(groups), caption)
    settings = [
        record.settings
        for kind, record in results
        if kind != CHOICES and record.identity.get("method") != unscored
    ] or [run.settings]
    page.table(["setting", "value"], _settings(settings), "Settings, with all values that they had")


def read_curves(folder: Path) -> dict[str, dict[str, Curve]]:
    """Return what every training run of a folder logged, by its name; ``fit`` is the folder's own.

    Raises:
        GatesError: A log is damaged.
    """
    paths = {"fit": folder / "metrics.csv"}
    paths |= {path.parent.name: path for path in sorted(folder.glob("*/metrics.csv"))}
    runs = {name: _curves(path) for name, path in paths.items() if path.is_file()}
    return {name: curves for name, curves in runs.items() if curves}


def _curves(path: Path) -> dict[str, Curve]:
    try:
        return read_metrics(path)
    except (ValueError, KeyError, TypeError) as error:
        raise GatesError(f"{path} is damaged ({error}): remove it, or run `fit` again") from error


def _results(folder: Path) -> list[tuple[str, Record]]:
    """Return kind and record of every result of a run folder but trials, training runs first."""
    results = []
    paths = [folder / RECORD, *sorted(folder.glob(f"*/{RECORD}"))]
    for path in [*paths, *sorted(folder.glob(f"*/*/{RECORD}"))]:
        depth = len(path.relative_to(folder).parts)
        kind = path.relative_to(folder).parts[0] if depth == 3 else "training"
        record = read_record(path.parent)
        if record is not None and kind != TRIALS and not path.parent.name.startswith("."):
            results.append((kind, record))
    return results


def _groups(results: Sequence[tuple[str, Record]]) -> list[list[Any]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for kind, record in results:
        groups.setdefault((kind, str(record.identity.get("method"))), []).append(record)
    return [
        [
            kind,
            method,
            len(records),
            number(sum(record.seconds for record in records) or None),
            ", ".join(sorted({record.origin for record in records})),
            ", ".join(sorted({(record.revision or "–")[:SHORT] for record in records})),
        ]
        for (kind, method), records in groups.items()
    ]


def _settings(every: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for name in sorted({name for settings in every for name in settings}):
        values = list(dict.fromkeys(_shown(s[name]) for s in every if s.get(name) is not None))
        more = [f"{len(values) - MOST_VALUES} more"] if len(values) > MOST_VALUES else []
        if values:
            rows.append([name, ", ".join([*values[:MOST_VALUES], *more])])
    return rows


def _shown(value: Any) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
