"""Training runs by Lightning on all processes that there are, whose results are compared."""

import warnings
from pathlib import Path

import lightning as L
from torch.distributed import get_rank, is_initialized

from harness.runs.terminal import quiet_lightning

UNIMPORTANT = (
    ".*does not have many workers",
    ".*IterableDataset. has .__len__. defined",
    ".*LeafSpec",
    ".*ended before the epoch ended",
    ".*`training_step`.*",
)


class StopAfter(L.Callback):
    """Saves after a step and stops there."""

    def __init__(self, step, folder):
        self.step, self.path = step, Path(folder) / "stopped.ckpt"

    def on_train_batch_end(self, trainer, *_):
        if self.step == trainer.global_step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(module, data, folder, *, trainer=L.Trainer, resume="", **options):
    """Train for an epoch, every warning but those of small loaders an error."""
    ranks = {"strategy": "ddp", "devices": 2} if is_initialized() else {"devices": 1}
    fitted = trainer(
        max_epochs=1, accelerator="cpu", use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **({"num_sanity_val_steps": 0} | ranks | options),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_lightning()
        for message in UNIMPORTANT:
            warnings.filterwarnings("ignore", message=message)
        fitted.fit(module, data, ckpt_path=resume or None, weights_only=True)
    return fitted


def rows_of_rank(number):
    """Every other one of two ranks, all of one process."""
    rank, world = (get_rank(), 2) if is_initialized() else (0, 1)
    return list(range(rank, number, world))


def validation_scores(trainer, prefix="val"):
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def largest_difference(left, right, rows=slice(None)):
    assert left.keys() == right.keys()
    return max(float((left[n][rows] - right[n][rows]).double().abs().max()) for n in left)
