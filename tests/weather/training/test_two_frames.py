"""Cyclic training of Adas with a forecast model that starts from two analyses."""

import lightning as L
import pytest
import torch
from torch import nn

from weather.training.adas_module import AdasModule
from weather.training.stream import AssimilationDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*IterableDataset. has .__len__. defined"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended"),
]


class Damped(nn.Module):
    """Goes half of the last step further; what it was given is recorded."""

    frames, step_hours = 2, 6.0

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, states, hours, previous=None):
        self.given.append((states.clone(), previous.clone()))
        return states + 0.5 * (states - previous)


class Recorder(L.Callback):
    """Keeps every analysis and batch; saves after a step and stops there."""

    def __init__(self, step=None, path=None):
        self.step, self.path = step, path
        self.analyses, self.batches = [], []

    def setup(self, trainer, module, stage):
        original = module.forward

        def forward(batch, background):
            analysis = original(batch, background)
            self.analyses.append(analysis.detach().clone())
            self.batches.append(batch)
            return analysis

        module.forward = forward

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.fixture(scope="module")
def fit(twin, small_adas, tmp_path_factory):
    def run(*, step=None, path=None, ckpt_path=None, **options):
        model = Damped()
        module = AdasModule(small_adas(), forecasts=[model, model], **options)
        data = AssimilationDataModule(
            twin.source(), steps=12, timelines=4, validation_steps=1, validation_timelines=2
        )
        torch.manual_seed(0)
        recorder = Recorder(step, path)
        trainer = L.Trainer(
            max_epochs=1,
            limit_val_batches=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path_factory.mktemp("fit"),
            callbacks=[recorder],
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return recorder, model, module

    return run


@pytest.fixture(scope="module")
def whole(fit):
    """Twelve steps, no analysis of which is lost."""
    return fit(divergence_limit=1e9)


def test_a_forecast_gets_the_last_two_analyses_of_its_timeline(whole):
    recorder, model, _ = whole
    calls = iter(model.given)
    continued = 0
    for step, batch in enumerate(recorder.batches):
        cycled = ~batch.reset
        for number in range(2):
            rows = cycled & (batch.model == number)
            if not bool(rows.any()):
                continue
            states, previous = next(calls)
            last, before = recorder.analyses[step - 1], recorder.analyses[step - 2]
            begun = recorder.batches[step - 1].reset[rows]
            assert torch.equal(states, last[rows])
            expected = torch.where(begun[:, None, None, None], last[rows], before[rows])
            assert torch.equal(previous, expected)
            continued += int((~begun).sum())
    assert continued > 8
    assert next(calls, None) is None


def test_a_timeline_that_begins_again_from_the_truth_has_no_earlier_state(fit, tmp_path):
    # Every analysis is lost.
    _, model, _ = fit(divergence_limit=1e-9, step=8, path=tmp_path / "stopped.ckpt")
    assert model.given
    for states, previous in model.given:
        assert torch.equal(states, previous)


def test_both_analyses_are_taken_up_again(fit, whole, tmp_path):
    unbroken, _, module = whole
    path = tmp_path / "stopped.ckpt"
    fit(step=7, path=path, divergence_limit=1e9)  # inside a block
    saved = torch.load(path, weights_only=True)
    assert not torch.equal(saved["before"], saved["carried"])
    rest, _, resumed = fit(ckpt_path=path, divergence_limit=1e9)
    assert len(rest.analyses) == 5
    for one, other in zip(rest.analyses, unbroken.analyses[7:], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    del saved["before"]
    torch.save(saved, path)
    forgetful, _, _ = fit(ckpt_path=path, step=8, path=path, divergence_limit=1e9)
    assert not torch.equal(forgetful.analyses[0], unbroken.analyses[7])


def test_models_of_one_state_leave_nothing_behind(twin, small_adas):
    module = AdasModule(small_adas(), forecasts=[twin.world.model])
    assert module.before == {}
