"""``gates study report``: the page of a run, with the figures of its study."""

import importlib
from collections.abc import Callable
from pathlib import Path

from apps.study.study_run import study_of
from core_gates.errors import GatesError
from harness.experiment.run import Run
from harness.report.page import Page
from harness.report.sections import run_page

DRAWN = {
    "gaussian-rates": "apps.study.gaussian_rates:draw",
    "gates": "apps.study.gate_comparison:draw",
    "comet": "apps.study.comet:draw",
    "dense-to-sparse": "apps.study.dense_to_sparse:draw",
    "evomoe": "apps.study.evomoe_figures:draw",
}
"""Study -> what draws its own figures."""

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
    if study is None:
        raise GatesError(f"{folder} holds no study: run one first, or give its --root")
    found = Run(folder, app="study", verb=study)
    page = run_page(found, _drawer(found, study), units=UNITS.get(study, "glyphs"))
    print(page.write(folder / "report.html"))


def _drawer(run: Run, study: str) -> Callable[[Page], None] | None:
    """Return what adds the figures of a study to the page."""
    if study not in DRAWN:
        return None
    module, _, name = DRAWN[study].partition(":")
    draw = getattr(importlib.import_module(module), name)
    return lambda page: draw(page, run)
