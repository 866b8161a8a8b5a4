"""A training claims its run folder once its data are ready, and leaves no trace if they are not."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from harness.runs.folder import RunFolder
from harness.runs.quiet import release_warnings


class FolderClaim(Callback):
    """Claim the run folder after ``prepare_data`` and ``setup`` of the data, before the first step.

    Lightning opens the files of its loggers before it sets up the data, so the Trainer gets them
    here. Only the first rank claims; the others wait.

    Args:
        run_folder: The folder of the run.
        config: What becomes its ``config.yaml``.
        loggers: Those of the training.
    """

    def __init__(self, run_folder: RunFolder, config: str, loggers: Sequence[Logger]) -> None:
        self.run_folder, self.config, self.loggers = run_folder, config, list(loggers)
        self.claimed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Claim the folder for a training, once.

        Raises:
            GatesError: Another run has taken it meanwhile.
        """
        release_warnings()
        if stage != "fit" or self.claimed:
            return
        self.claimed = True
        if trainer.is_global_zero:
            self.run_folder.open()
            self.run_folder.write_config(self.config)
        trainer.strategy.barrier("claim")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.loggers = self.loggers
