"""Lightning's Trainer with loops that resume bit for bit."""

from typing import Any

from lightning.pytorch import Trainer

from harness.runs.loops import ExactEpochLoop, ExactFitLoop


class ExactTrainer(Trainer):
    """A Trainer whose killed and resumed training ends with the bits of an uninterrupted one.

    It is to be resumed from what :class:`harness.runs.checkpoint.RunCheckpoint` writes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        steps = self.fit_loop.epoch_loop
        self.fit_loop = ExactFitLoop(self, self.fit_loop.min_epochs, self.fit_loop.max_epochs)
        self.fit_loop.epoch_loop = ExactEpochLoop(self, steps.min_steps, steps.max_steps)
