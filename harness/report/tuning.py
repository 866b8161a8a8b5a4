"""The section of a report that says how settings were chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core_gates.errors import GatesError
from harness.experiment import Choice, Figures, Run
from harness.experiment.piece import Piece, Setting
from harness.experiment.printing import number
from harness.experiment.record import Record, read_record
from harness.experiment.run import CHOICES
from harness.figures import Tried, trials_figure
from harness.figures.trials import numeric_settings
from harness.report.page import Page

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
        own: See :func:`found_choices`.
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
            table=_table(choices),
        )


def found_choices(run: Run, own: Mapping[str, Setting] | None = None) -> dict[str, Choice]:
    """Return the choices of the run folder, or else of the package where settings agree.

    Args:
        run: The run.
        own: Settings of a method, by its name, that differ from those of the run, such as its
            network.

    Raises:
        GatesError: A choice is damaged.
    """
    store = run.store(CHOICES, Figures())
    found: dict[str, Choice] = {}
    for folder in (store.folder, *store.read_only):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            record = read_record(path)
            if record is None or path.name.startswith("."):
                continue
            if folder == store.folder or _agrees(record, run, own or {}):
                found.setdefault(_name(record), _choice(path))
    return found


def _agrees(record: Record, run: Run, own: Mapping[str, Setting]) -> bool:
    """Return whether a choice has no setting that is another one for its method in this run."""
    method = str(record.identity.get("method"))
    settings = Piece("", settings={**run.settings, **own.get(method, {})}).settings
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


def _table(choices: dict[str, Choice]) -> tuple[list[str], list[list[Any]]]:
    every = [(method, trial) for method, choice in choices.items() for trial in choice.trials]
    names = list(dict.fromkeys(name for _, trial in every for name in trial))
    chosen = {method: choice.setting for method, choice in choices.items()}
    rows = [
        [method, *(trial.get(name) for name in names),
         all(trial.get(n) == value for n, value in chosen[method].items())]
        for method, trial in every
    ]  # fmt: skip
    return ["method", *names, "chosen"], rows
