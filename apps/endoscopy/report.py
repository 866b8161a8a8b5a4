"""The report of an endoscopy run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from apps.endoscopy.honest import TUNING
from apps.endoscopy.scoring import OTHERS, PREDICTIONS, SUBGROUPS
from apps.endoscopy.training import Trainings
from core_gates.errors import GatesError
from endoscopy.evaluation.size_evaluation import HEADLINE, SECONDARY, TEST, apart
from endoscopy.experiments.sizers import Training
from endoscopy.explain.pictures import picture_figures
from endoscopy.plots import subgroup_figure
from endoscopy.plots.captioned import agreement_figures, audit_figures, study_figures
from endoscopy.training.variants import VARIANTS
from harness.experiment.printing import number
from harness.experiment.scores import Scores, read_scores
from harness.report.gates import gate_section
from harness.report.page import Page

EXPLANATION = """
Objects count, not frames: the size of a lesion is the median over its frames. Intervals are
bootstrapped over patients, and over seeds where there are several. `macro_f1` is of the classes up
to 5 mm, between, and from 10 mm on; `mape` is the mean relative error. `coverage` is the share of
true sizes inside their 90 % intervals, `abstained` the share of frames that no size should be read
from; `accepted` are the objects with other frames, `abstained` those without.
"""
GATES = """
Values of every gate on some test frames: how open it was on average, and which share was closed
(below 0.1) or open (above 0.9).
"""
RESEARCH = "**Research only.** Not a medical device; not for any decision about a patient."


def endoscopy_report(trainings: Trainings) -> Path:
    """Write ``report.html`` from what the verbs left in the run folder.

    Raises:
        GatesError: There are no scores yet, or none of an evaluation.
    """
    run = trainings.run
    folder, scores = run.folder, read_scores(run.scores, run.app)
    if not scores.headline:
        raise GatesError(
            f"{folder} has no scores of a constant and the apparent area, with which a report "
            "begins: run `gates endoscopy evaluate` first"
        )
    page = Page(f"Endoscopy: {folder.name}", scores.headline)
    page.text(RESEARCH)
    for note in filter(None, scores.notes):
        page.text(note)
    _add_scores(page, scores)
    _add_subgroups(page, folder)
    path = folder / PREDICTIONS
    if path.is_file():
        _add_predictions(page, trainings, pd.read_parquet(path))
    gate_section(page, folder, GATES)
    sections = (
        ("Audits", audit_figures, "What the network leans on."),
        ("Do gates help?", study_figures, "Gates and the same network without."),
    )
    for title, figures, text in sections:
        found = list(figures(folder))
        if found:
            page.section(title).text(text)
        for figure, caption in found:
            page.figure(figure, caption)
    _add_tuning(page, folder / TUNING)
    return page.write(folder / "report.html")


def _add_tuning(page: Page, path: Path) -> None:
    """Add the settings of the honest table's variants, which trials have chosen."""
    if not path.is_file():
        return
    table = pd.read_parquet(path)
    count = int(table.pop("trials").max())
    header = [{"error": "mean error of log size"}.get(str(name), str(name)) for name in table]
    rows = [[None if pd.isna(x) else x for x in row] for row in table.itertuples(index=False)]
    caption = f"Chosen of {count} trials of each variant, by the error of the validation objects"
    page.table(header, rows, caption)


def _add_scores(page: Page, scores: Scores) -> None:
    """Add the figures of the evaluation; those of audits are in their figures."""
    rows = [row for row in scores.rows if not row.task.startswith(OTHERS)]
    shown = apart([row for row in rows if row.metric in HEADLINE]) or rows
    methods = dict.fromkeys(row.method for row in shown)
    page.section("Scores").text(EXPLANATION)
    page.scores(scores._replace(rows=shown))
    named = [f"`{m}`: {VARIANTS[m].summary}" for m in methods if m in VARIANTS]
    if named:
        page.text(f"{'; '.join(named)}.")
    other = [row for row in rows if row.task == TEST and row.metric in SECONDARY]
    if other:
        page.section("Other scores").text("Of the same test objects.")
        page.scores(Scores(other))


def _add_subgroups(page: Page, folder: Path) -> None:
    """Add figure and numbers of the groups of test objects that the evaluation has left."""
    path = folder / SUBGROUPS
    if not path.is_file():
        return
    table = pd.read_parquet(path)
    page.section("Subgroups").figure(subgroup_figure(table), "Groups of test objects.")
    names = [str(name) for name in table if f"{name}_low" in table]
    rows = [
        [one["column"], one["group"], int(one["objects"]), *(_interval(one, n) for n in names)]
        for _, one in table.iterrows()
    ]
    caption = "95 % intervals; groups of few objects have no scores"
    page.table(["by", "group", "objects", *names], rows, caption)


def _interval(one: pd.Series, name: str) -> str:
    if pd.isna(one[name]):
        return "–"
    return f"{number(one[name])} [{number(one[f'{name}_low'])}, {number(one[f'{name}_high'])}]"


def _add_predictions(page: Page, trainings: Trainings, predictions: pd.DataFrame) -> None:
    """Add figures of the first seed of the first variant."""
    trained = predictions[predictions["variant"].isin(VARIANTS)]
    first = trained.iloc[0]
    training = Training(first["variant"], int(first["seed"]))
    try:
        bundle = trainings.load(training)
    except GatesError as error:  # a checkpoint was scored, or the weights differ or are gone
        page.text(f"Agreement and pictures are left out: {error}.")
        return
    cut_offs = trainings.sizers.module.cut_offs
    of_first = (trained["variant"] == training.variant) & (trained["seed"] == training.seed)
    own = trained[of_first].drop(columns=["variant", "seed"])
    test = own[own["task"] == TEST].drop(columns=["task"]).dropna(axis=1, how="all")
    page.section("Agreement").text(f"{VARIANTS[training.variant].summary}, seed {training.seed}.")
    for figure, caption in agreement_figures(test, bundle, cut_offs):
        page.figure(figure, caption)
    page.section("Pictures")
    for figure, caption in picture_figures(test, bundle, trainings.sizers.data(training)):
        page.figure(figure, caption)
