"""The Trainer whose public methods are the verbs of an application."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.experiment import Run
from harness.runs.folder import RunFolder
from harness.runs.loops import ExactTrainer

if TYPE_CHECKING:
    from harness.report.page import Page


class GatesRunTrainer(ExactTrainer):
    """Lightning's Trainer with exact resuming and a run folder; an application adds its verbs.

    A verb is a documented, typed method that takes ``model`` and ``datamodule`` first; its other
    arguments become options of the command line::

        class DigitsTrainer(GatesRunTrainer):
            def tune(self, model: Classifier, datamodule: Digits, trials: int = 8) -> None:
                \"\"\"Choose the settings of every method.

    Args:
                    model: Filled in by the command line.
                    datamodule: Filled in by the command line.
                    trials: Trials of each method.
                \"\"\"
                self.run().tune(SPACES, trial, trials=trials)

    Attributes:
        run_folder: Where the verb writes; claimed for ``fit`` once its data are ready, untouched
            for other verbs.
        config_path: The file given with ``--config``, or None.
        run_options: Options of the command line for runs: settings, package, command.
    """

    run_folder: RunFolder
    config_path: Path | None = None
    run_options: dict[str, Any]

    def run(
        self,
        *,
        quick: bool = False,
        only: Collection[str] = (),
        seeds: Collection[int] | None = None,
    ) -> Run:
        """Return the run: its settings, results, tuning and scores.

        Args:
            quick: A quick run: nothing is trained, scores have no bars.
            only: Methods that take part; all when empty.
            seeds: Seeds of an evaluation; None for what writes no scores.

        Raises:
            GatesError: Scores of a full evaluation exist, which a quick run, or one with fewer
                methods or seeds, would replace.
        """
        return Run.of(
            self.run_folder,
            config_path=self.config_path,
            quick=quick,
            only=only,
            seeds=seeds,
            **self.run_options,
        )

    def report(self, model: Any, datamodule: Any) -> None:
        """Write the report of a run as one HTML page, and its figures as PNG with their numbers.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        from harness.report.sections import run_page  # matplotlib takes a second

        page = run_page(
            self.run(),
            lambda page: self.add_to_report(page, model, datamodule),
            **self.report_options(),
        )
        print(page.write(self.run_folder.report))

    def add_to_report(self, page: "Page", model: Any, datamodule: Any) -> None:
        """Add what only the domain can show, below the scores; an application overrides it.

        Args:
            page: The report.
            model: Untrained network of the configuration.
            datamodule: Data of the configuration.
        """

    def report_options(self) -> dict[str, Any]:
        """Return further options of :func:`harness.report.sections.run_page`."""
        return {}
