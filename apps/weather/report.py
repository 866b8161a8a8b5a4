"""The report of a weather run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness.experiment.scores import Scores, read_scores
from harness.report.gates import gate_section
from harness.report.page import Page
from harness.runs.folder import RunFolder
from weather.experiments.experiment import Experiment, shown
from weather.experiments.pictures import load_pictures
from weather.plots import scorecard_figure
from weather.plots.labels import unit_label
from weather.state import SHORT_NAMES, ChannelSpec

DEPARTURES = ("ob_rms", "oa_rms", "withheld_rmse")
EXPLANATION = """
Root mean square errors against the known truth, area-weighted. `ratio` is over the background.
`lost` counts timelines that left the truth; they are scored as the free run.

`crossed`: the network of every seed on the timelines of all seeds. `redrawn`: the observing network
is another one in every cycle. `corrupted`: half of the reports have five times their errors; the
error of the analysis is over that without this half, with the large errors `declared`, `denied`
(stated as usual) or the confidence `forced` to one.
"""
GATES = """
Values of every gate of the increment form during one analysis at the largest density: how open it
was on average, and which share was closed (below 0.1) or open (above 0.9).
"""
DEPARTED = """
Root mean squares of observation minus background (`ob`) and minus analysis (`oa`), and of withheld
observations minus an analysis that did not see them. All contain the errors of the observations.
"""


def weather_report(run_folder: RunFolder, source: Experiment) -> Path:
    """Write ``report.html`` from what ``evaluate`` left in the run folder.

    Raises:
        GatesError: There are no scores yet, or a file of the run folder is damaged.
    """
    scores = read_scores(run_folder.scores, "weather")
    page = Page(
        f"Weather: {run_folder.name}", "Gated data assimilation next to the classical methods"
    )
    notes = "".join(f"\n\n{note}" for note in source.notes)
    page.section("Scores").text(EXPLANATION + _units(source.channels) + notes).scores(
        _only(scores, source.headline)
    )
    card = _scorecard(scores, source)
    if card is not None:
        page.figure(card, "Errors of every method; blue is better than the reference.")
    departures = _only(scores, shown(source.channels, *DEPARTURES))._replace(bars=[])
    if departures.rows:
        page.section("Against the observations").text(DEPARTED).scores(departures)
    page.section("Pictures")
    if source.attribution:
        page.text(source.attribution)
    figures = source.figures(load_pictures(run_folder.path / source.pictures_file))
    for caption, figure in figures:
        page.figure(figure, caption)
    gate_section(page, run_folder.path, GATES)
    return page.write(run_folder.report)


def _units(channels: ChannelSpec) -> str:
    short = {SHORT_NAMES.get(name, name): (name, unit_label(name)) for name, _ in channels}
    named = (f"`{s}` {name.replace('_', ' ')} in {unit}" for s, (name, unit) in short.items())
    return f"Errors of {', '.join(named)}."


def _only(scores: Scores, metrics: set[str]) -> Scores:
    return scores._replace(rows=[row for row in scores.rows if row.metric in metrics])


def _scorecard(scores: Scores, source: Experiment) -> Figure | None:
    """Return a figure of the first channel that the scores name, or None without rows."""
    label, reference = source.field, source.reference
    rows = {
        (row.method, row.task): row.value for row in scores.rows if row.metric == f"rmse_{label}"
    }
    methods = list(dict.fromkeys(method for method, _ in rows))
    tasks = list(dict.fromkeys(task for _, task in rows))
    if reference not in methods:
        return None
    values = np.array([[rows.get((m, t), np.nan) for t in tasks] for m in methods], dtype=float)
    return scorecard_figure(methods, tasks, values, reference=reference, title=f"RMSE of {label}")
