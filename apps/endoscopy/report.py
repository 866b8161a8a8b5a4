"""The report of an endoscopy run: the page of every application, with endoscopy's additions."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from apps.endoscopy.size_scoring import AUDIT_FOLDER, HONEST, OTHERS, PREDICTIONS, STUDY, SUBGROUPS
from apps.endoscopy.training_runs import Trainings
from core_gates.errors import GatesError
from endoscopy.evaluation.size_evaluation import ACCURACY, CERTAINTY, SECONDARY, TEST
from endoscopy.experiments.scored_predictions import AUDIT, QUESTIONS, SHOWN
from endoscopy.experiments.sizers import CONFIGURED, VARIANTS, Training
from endoscopy.explain.strips import picture_figures
from endoscopy.plots import agreement_figures, ladder_figure, subgroup_figure
from harness.evidence import Row
from harness.experiment.scores import Scores, number, read_scores
from harness.report.page import Page
from harness.report.sections import add_differences, run_page

EXPLANATION = """
Objects count, not frames: the size of a lesion is the median over its frames. Intervals are
bootstrapped over patients, and over seeds where there are several. `macro_f1` is that of three
classes: up to 5 mm, between, and from 10 mm on; `mape` is the mean relative error.
"""
CERTAIN = """
`coverage` is the fraction of true sizes inside their 90 % intervals, `abstained` the fraction of
frames from which no size should be read; `accepted` are the objects with other frames, `abstained`
those without.
"""
MEANINGS = {CONFIGURED: "the network of the configuration, nothing changed"}
COLUMNS = 6  # metrics of a table


def endoscopy_report(trainings: Trainings) -> Path:
    """Write ``report.html`` from what the verbs left in the run folder.

    Raises:
        GatesError: There are no scores yet, or none of an evaluation.
    """
    run = trainings.run
    scores = read_scores(run.scores, run.app)
    if not scores.headline:
        raise GatesError(
            f"{run.folder} has no scores of a constant and the apparent area, with which a report "
            "begins: run `gates endoscopy evaluate` first"
        )
    if (run.folder / HONEST).is_file():
        run.settings.pop("trainer.max_steps", None)  # that of `fit`, not of the trials
    page = run_page(run, partial(_draw, trainings, scores.rows), metrics=ACCURACY)
    warning = "**Research only.** Not a medical device; not for any decision about a patient."
    page.subtitle = f"{scores.headline} {warning}"
    return page.write(run.folder / "report.html")


def _draw(trainings: Trainings, rows: Sequence[Row], page: Page) -> None:
    folder = trainings.run.folder
    own_rows = [row for row in rows if not row.task.startswith(OTHERS)]
    compared = [m for m in dict.fromkeys(row.method for row in own_rows) if m in VARIANTS]
    page.section("What the scores mean").text(EXPLANATION)
    if named := [f"`{m}`: {MEANINGS.get(m, VARIANTS[m].summary)}" for m in compared]:
        page.text(f"{'; '.join(named)}.")
    if certain := [row for row in own_rows if row.metric in CERTAINTY]:
        page.section("Intervals and abstention").text(CERTAIN).scores(Scores(certain))
    _add_others(page, [row for row in own_rows if row.task == TEST and not row.versus])
    _add_subgroups(page, folder / SUBGROUPS)
    if (folder / PREDICTIONS).is_file():
        _add_predictions(page, trainings, pd.read_parquet(folder / PREDICTIONS))
    _add_audits(page, rows, folder / AUDIT_FOLDER / "ladder.parquet")
    if studied := [row for row in rows if row.task.startswith(STUDY) and row.metric in SHOWN]:
        page.section("Studies of gates").text("The same small network with and without gates.")
        add_differences(page.scores(Scores(studied)), studied)


def _add_others(page: Page, rows: Sequence[Row]) -> None:
    """Add the metrics that the first tables leave out, a few in each table."""
    measured = {row.metric for row in rows}
    if metrics := [metric for metric in SECONDARY if metric in measured]:
        page.section("Other scores").text("Of the same test objects.")
    for start in range(0, len(metrics), COLUMNS):
        shown = metrics[start : start + COLUMNS]
        page.scores(Scores([row for row in rows if row.metric in shown]))


def _add_subgroups(page: Page, path: Path) -> None:
    """Add a figure and a table of the groups of test objects."""
    if not path.is_file():
        return
    table = pd.read_parquet(path)
    page.section("Subgroups").figure(subgroup_figure(table), "Groups of test objects.")
    names = [str(name) for name in table if f"{name}_low" in table]
    rows = [
        [
            group["column"],
            group["group"],
            int(group["objects"]),
            *(_interval(group, n) for n in names),
        ]
        for _, group in table.iterrows()
    ]
    caption = "95 % intervals; groups of few objects have no scores"
    page.table(["by", "group", "objects", *names], rows, caption)


def _interval(group: pd.Series, name: str) -> str:
    if pd.isna(group[name]):
        return "–"
    return (
        f"{number(group[name])} [{number(group[f'{name}_low'])}, {number(group[f'{name}_high'])}]"
    )


def _add_predictions(page: Page, trainings: Trainings, predictions: pd.DataFrame) -> None:
    """Add figures of the first seed of the first variant."""
    trained = predictions[predictions["variant"].isin(VARIANTS)]
    first = trained.iloc[0]
    training = Training(first["variant"], int(first["seed"]))
    try:
        bundle = trainings.load(training)
    except GatesError as error:  # a checkpoint was scored, or the weights differ or are missing
        page.text(f"Agreement and pictures are left out: {error}.")
        return
    cut_offs = trainings.sizers.module.cut_offs
    of_first = (trained["variant"] == training.variant) & (trained["seed"] == training.seed)
    of_first_training = trained[of_first].drop(columns=["variant", "seed"])
    test = (
        of_first_training[of_first_training["task"] == TEST]
        .drop(columns=["task"])
        .dropna(axis=1, how="all")
    )
    page.section("Agreement").text(f"`{training.variant}`, seed {training.seed}.")
    for figure, caption in agreement_figures(test, bundle, cut_offs):
        page.figure(figure, caption)
    page.section("Pictures")
    for figure, caption in picture_figures(test, bundle, trainings.sizers.data(training)):
        page.figure(figure, caption)


def _add_audits(page: Page, rows: Sequence[Row], ladder: Path) -> None:
    """Add the questions of the audits, whose scores are in the first tables, and the ladder."""
    tasks = dict.fromkeys(
        row.task.removeprefix(AUDIT) for row in rows if row.task.startswith(AUDIT)
    )
    if not tasks:
        return
    asked = [f"`{AUDIT}{name}`: {QUESTIONS[name]}" for name in tasks if name in QUESTIONS]
    page.section("Audits").text("\n\n".join(["What the network relies on.", *asked]))
    if ladder.is_file():
        page.figure(
            ladder_figure(pd.read_parquet(ladder)),
            "Regressions on hand-made cues, with and without automatic exposure.",
        )
