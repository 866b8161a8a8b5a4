"""What the report of a weather run shows beyond the sections that every application has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness.evidence import Row
from harness.experiment.scores import Scores, read_scores
from harness.report.page import Page
from weather.experiments.experiment import Experiment, shown
from weather.experiments.pictures import load_pictures
from weather.plots import scorecard_figure
from weather.plots.labels import channel_unit

DEPARTURES = ("ob_rms", "oa_rms", "withheld_rmse")
METRICS = """
Errors are root mean squares against the known truth, weighted by area. `ratio` is the error over
that of the background; below 1 the observations helped. `lost` counts the timelines that lost the
truth; they are scored as the free run.

`crossed`: the networks of all seeds on the timelines of all seeds. `redrawn`: the observing network
changes in every cycle. `corrupted`: half of the reports have five times their errors, and the error
of the analysis is divided by that of an analysis without this half; `declared`: the larger errors
are stated, `denied`: the usual ones are, `forced`: the confidence in this half is set to one.
"""
DEPARTED = """
Root mean squares of observation minus background (`ob_rms`), of observation minus analysis
(`oa_rms`), and of withheld observations minus an analysis made without them (`withheld_rmse`). All
contain the observation errors, in the units of the fields.
"""
GATED = """
The gates below are those of the increment form, or of the first form that was scored, during one
analysis at the largest density. A value below 0.1 counts as closed, one above 0.9 as open.
"""


def add_to_page(page: Page, folder: Path, experiment: Experiment) -> None:
    """Add what the metrics mean, the scorecard, departures from observations, and pictures.

    Args:
        page: The report.
        folder: The run folder, with what ``evaluate`` left in it.
        experiment: Of the configuration.

    Raises:
        GatesError: A file of the run folder is damaged.
    """
    scores = read_scores(folder / "scores.json", "weather")
    pictures = load_pictures(folder / experiment.pictures_file)
    page.section("What the metrics mean").text(METRICS)
    rows = [row for row in scores.rows if not row.versus]
    if card := scorecard(rows, experiment):
        page.figure(card, "The same errors at a glance: blue is better than the reference.")
    departures = shown(experiment.channels, *DEPARTURES)
    if found := [row for row in rows if row.metric in departures]:
        page.section("Departures from the observations").text(DEPARTED).scores(Scores(found))
    figures = experiment.figures(pictures)
    if figures:
        page.section("Analyses").text(experiment.attribution)
    for caption, figure in figures:
        page.figure(figure, caption)
    page.text(GATED)


def scorecard(rows: list[Row], experiment: Experiment) -> Figure | None:
    """Return the errors of the main field by method and task; None without the reference."""
    label, reference = experiment.field, experiment.reference
    found = {(row.method, row.task): row.value for row in rows if row.metric == f"rmse_{label}"}
    complete = [task for method, task in found if method == reference]
    methods = list(dict.fromkeys(method for method, _ in found))
    if not complete:
        return None
    values = np.array([[found.get((m, t), np.nan) for t in complete] for m in methods])
    title = f"RMSE of {label} in {channel_unit(experiment.channels, label)}"
    return scorecard_figure(methods, complete, values, reference=reference, title=title)
