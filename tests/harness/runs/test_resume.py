# ruff: noqa: NPY002 (the global generator of numpy is tested)
"""Training stopped at chosen steps and resumed in the same process, against uninterrupted runs."""

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from core_gates.errors import GatesError
from harness.command import GatesRunTrainer
from harness.runs.callbacks import RunCheckpoint, load_weights
from harness.runs.loops import ResumableCSVLogger


@pytest.fixture
def fit(toy, tmp_path):
    """Train the toy in ``tmp_path/name``; a second call of that name resumes it."""
    seen = toy.ToyCLI  # the import has silenced what a command line silences
    assert seen.app == "toy"

    def run(name: str, *, max_steps: int = -1, module=None, data=None, workers: int = 0, **options):
        folder = tmp_path / name
        seed_everything(5)
        module, data = module or toy.ToyModule(), data or toy.ToyData(num_workers=workers)
        last = folder / "checkpoints" / "last.ckpt"
        trainer = GatesRunTrainer(
            max_steps=max_steps,
            max_epochs=4,
            accelerator="cpu",
            log_every_n_steps=1,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            logger=ResumableCSVLogger(folder),
            callbacks=[RunCheckpoint(every_n_steps=3, monitor="val/loss")],
            **options,
        )
        resume = str(last) if last.is_file() else None
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return folder

    return run


@pytest.fixture(autouse=True)
def quiet():
    from harness.runs.terminal import quiet_lightning

    quiet_lightning()


# An epoch of the toy has 7 batches: stops within an epoch, at its last batch and just after it.
def test_stopped_trainings_end_like_unbroken_ones(fit, same_checkpoint):
    whole = fit("whole")
    for stops in ([1], [6], [7], [8], [3, 10, 20], [14]):
        for stop in (*stops, -1):
            broken = fit(f"broken at {stops}", max_steps=stop)
        assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text(), stops
        for name in ("last.ckpt", "best.ckpt"):
            same_checkpoint(whole / "checkpoints" / name, broken / "checkpoints" / name)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 2},
        {"workers": 1},
        {"limit_train_batches": 5},
        {"check_val_every_n_epoch": 2},
    ],
    ids=str,
)
def test_options_that_change_the_loop(fit, same_checkpoint, options):
    whole = fit("whole", **options)
    fit("broken", max_steps=5, **options)
    broken = fit("broken", **options)
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    same_checkpoint(*(f / "checkpoints" / "last.ckpt" for f in (whole, broken)))


class StatefulLoader(DataLoader):
    """A loader that knows its position and must therefore not be replayed."""

    position = 0
    resumed_at: ClassVar[list[int]] = []

    def __iter__(self):
        start, self.position = self.position, 0
        self.resumed_at.append(start)
        order = torch.arange(len(self.dataset)).split(self.batch_size)
        for index, rows in enumerate(order[start:], start):
            self.position = index + 1
            yield [
                torch.stack(column) for column in zip(*(self.dataset[i] for i in rows), strict=True)
            ]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_stateful_loader_is_asked_for_its_position(fit, toy, same_checkpoint):
    class Data(toy.ToyData):
        def train_dataloader(self):
            return StatefulLoader(self._set(self.num_samples, 1), self.batch_size)

    whole = fit("whole", data=Data())
    fit("broken", max_steps=4, data=Data())
    StatefulLoader.resumed_at.clear()
    broken = fit("broken", data=Data())
    assert StatefulLoader.resumed_at[0] == 4
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    same_checkpoint(*(f / "checkpoints" / "last.ckpt" for f in (whole, broken)))


def test_progress_is_restored_before_the_loader_is_built(fit, toy):
    seen = []

    class Data(toy.ToyData):
        def train_dataloader(self):
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            seen.append((self.trainer.global_step, self.trainer.current_epoch, progress.ready))
            return super().train_dataloader()

    fit("run", max_steps=10)
    fit("run", data=Data(), max_steps=12)
    assert seen == [(10, 1, 3)]


def test_a_finished_training_is_not_touched(fit):
    folder = fit("run")
    before = (folder / "metrics.csv").read_text()
    time = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    fit("run")
    assert (folder / "metrics.csv").read_text() == before
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == time


def test_same_seed_twice_gives_the_same_log(fit):
    assert (fit("a") / "metrics.csv").read_text() == (fit("b") / "metrics.csv").read_text()


def test_fewer_batches_than_the_checkpoint_saw(fit, toy):
    fit("run", max_steps=6)
    with pytest.raises(GatesError, match="after 6 batches of an epoch, but the data has 2"):
        fit("run", data=toy.ToyData(num_samples=16))


def test_the_best_checkpoint_is_the_best(fit):
    folder = fit("run")
    rows = (folder / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/loss")
    scores = [float(cells[column]) for row in rows[1:] if (cells := row.split(","))[column]]
    best = load_weights(folder / "checkpoints" / "best.ckpt")
    assert best["epoch"] - 1 == int(np.argmin(scores))


def test_a_first_score_that_is_no_number_is_not_the_best():
    keeper = RunCheckpoint(monitor="val/loss")
    trainer = SimpleNamespace(
        sanity_checking=False,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    for score, best in ((math.nan, None), (2.0, 2.0), (math.nan, 2.0), (3.0, 2.0), (1.0, 1.0)):
        trainer.callback_metrics = {"val/loss": torch.tensor(score)}
        keeper.on_validation_end(trainer, None)
        assert keeper.best_score == best


def test_a_score_that_is_not_logged_is_named(toy, tmp_path):
    trainer = GatesRunTrainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[RunCheckpoint(monitor="val/rmse")],
    )
    with pytest.raises(GatesError, match=r"'val/rmse' is not logged; logged are .*val/loss"):
        trainer.fit(toy.ToyModule(), toy.ToyData())


def test_checkpoints_are_read_without_executing_them(refuses, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weights": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(GatesError, match="damaged or not a checkpoint"):
        load_weights(tmp_path / "trap.ckpt")
    assert not (tmp_path / "executed").exists()
    refuses(GatesError, ("run fit first", lambda: load_weights(tmp_path / "none.ckpt")))


def test_random_states_come_back():
    from harness.runs.loops import capture_random_state, gather_random_states, restore_random_state

    random.gauss(0, 1)  # leaves a second deviate behind, which must come back, too
    np.random.normal()
    states = capture_random_state()
    (alone,) = gather_random_states(states)
    drawn = [
        random.gauss(0, 1),
        random.random(),
        np.random.normal(),
        np.random.rand(),
        torch.rand(3),
    ]
    restore_random_state(alone)
    again = [
        random.gauss(0, 1),
        random.random(),
        np.random.normal(),
        np.random.rand(),
        torch.rand(3),
    ]
    assert drawn[:4] == again[:4]
    assert torch.equal(drawn[4], again[4])
