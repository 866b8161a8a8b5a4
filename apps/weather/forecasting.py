"""``gates weather train-forecast``: the learned forecast model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apps.weather.pieces import NEUTRAL
from harness.command import GatesRunCLI
from harness.experiment import Piece, Run
from harness.runs.checkpoint import load_weights
from harness.runs.ticker import ticking
from weather.models.fengwu.form import ForecastForm

FORECASTS = "forecasts"
VERB = "train-forecast"


class ForecastCLI(GatesRunCLI):
    """The command line of ``train-forecast``, a training with a module and data of its kind."""

    app = "weather"
    verbs = ("fit",)
    trains = frozenset({"fit", VERB})
    package = "weather"
    neutral = NEUTRAL

    def after_instantiate_classes(self) -> None:
        """Refuse data that is damaged, or not that of the model, before a run folder is claimed."""
        self.model.check_source(self.datamodule.source)
        self.datamodule.source.check()
        self.datamodule.progress = ticking
        super().after_instantiate_classes()

    def training(self, run: Run) -> Piece:
        """Return the piece of the forecast model."""
        return run.piece("fengwu", run.settings.get("seed"))

    def keep(self, run: Run, piece: Piece, objects: Sequence[str]) -> Path | None:
        """Keep the best or last weights as a file that ``--forecast`` takes."""
        path = self.run_folder.best_checkpoint or self.run_folder.last_checkpoint
        if path is None:
            return None
        self.model.load_state_dict(load_weights(path)["state_dict"])
        self.model.forecast.channels = self.datamodule.source.channels
        store = run.store(FORECASTS, ForecastForm())
        return store.keep(piece, self.model.forecast, objects=objects) / ForecastForm.FILE
