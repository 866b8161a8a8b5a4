"""The Trainer whose public methods are the verbs of an application."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from harness.runs.folder import RunFolder
from harness.runs.loops import ExactEpochLoop, ExactFitLoop


class GatesRunTrainer(Trainer):
    """Lightning's Trainer with exact resuming and a run folder; an application adds its verbs.

    A verb is a documented, typed method that takes ``model`` and ``datamodule`` first; its other
    arguments become options of the command line::

        class WeatherTrainer(GatesRunTrainer):
            def tune(self, model: Assimilation, datamodule: WeatherData, trials: int = 40) -> None:
                \"\"\"Choose the settings of every method.

    Args:
                    model: Filled in by the command line.
                    datamodule: Filled in by the command line.
                    trials: Trials of each method.
                \"\"\"
                settings = ...
                write_json(self.run_folder.path / "settings.json", settings)

    Attributes:
        run_folder: Where the verb writes; claimed for ``fit`` once its data are ready, untouched
            for other verbs.
        config_path: The file given with ``--config``, or None.
    """

    run_folder: RunFolder
    config_path: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        steps = self.fit_loop.epoch_loop
        self.fit_loop = ExactFitLoop(self, self.fit_loop.min_epochs, self.fit_loop.max_epochs)
        self.fit_loop.epoch_loop = ExactEpochLoop(self, steps.min_steps, steps.max_steps)
