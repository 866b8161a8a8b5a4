"""``gates study report``: the page of a run, with the figures of its study."""

import importlib
from functools import partial
from pathlib import Path

from apps.study.study_run import StudyRun, study_of
from core_gates.errors import GatesError
from harness.report.sections import run_page

DRAWN = {
    "gaussian-rates": "apps.study.gaussian_rates",
    "gates": "apps.study.gate_comparison",
    "comet": "apps.study.comet",
    "dense-to-sparse": "apps.study.dense_to_sparse",
    "evomoe": "apps.study.evomoe_figures",
}
"""Study -> module whose ``draw`` adds its own figures."""

UNITS = {"gaussian-rates": "repeats", "evomoe": "documents"}
"""Study -> what its intervals are drawn from."""


def report(run: str, root: str = "runs") -> None:
    """Write the report of RUN, such as comet, as one HTML page, with figures as PNG and CSV.

    Nothing is trained: run the study first.

    Args:
        run: Name of the run; that of the study unless another one was given.
        root: Folder of all runs.
    """
    folder = Path(root) / "study" / run
    study = study_of(folder)
    if study not in DRAWN:
        raise GatesError(f"{folder} holds no study: run one first, or give its --root")
    study_run = StudyRun(folder, app="study", verb=study)
    draw = partial(importlib.import_module(DRAWN[study]).draw, run=study_run)
    page = run_page(study_run, draw, units=UNITS.get(study, "glyphs"))
    print(page.write(folder / "report.html"))
