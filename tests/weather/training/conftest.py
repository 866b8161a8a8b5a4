"""Training runs of a few steps, what they did, and where they stop."""

import lightning as L
import pytest
import torch

FILTERS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*IterableDataset. has .__len__. defined"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended"),
]


class Analyses(L.Callback):
    """Keeps what the module saw and made at every step."""

    def __init__(self):
        self.backgrounds, self.analyses, self.batches, self.scores = [], [], [], []

    def setup(self, trainer, module, stage):
        self.trainer, self.module, original = trainer, module, module.forward

        def forward(batch, background):
            analysis = original(batch, background)
            if module.training:
                self.backgrounds.append(background)
                self.analyses.append(analysis.detach().clone())
                self.batches.append(batch)
            return analysis

        module.forward = forward

    def on_train_batch_end(self, trainer, *_):
        self.scores.append(float(trainer.callback_metrics["train/score"]))


class StopAfter(L.Callback):
    """Saves after a step and stops there, without a change of the schedule."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """``train(module, data, *callbacks, ckpt_path=None, **options)``: an epoch, the trainer."""

    def run(module, data, *callbacks, ckpt_path=None, **options):
        settings = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path_factory.mktemp("train"),
            "limit_val_batches": 0,
        } | options
        torch.manual_seed(0)
        trainer = L.Trainer(**settings, callbacks=list(callbacks))
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run
