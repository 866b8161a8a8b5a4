"""Training a correction of interpolation in its own cycle: problems, module, resuming, ranks."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from tests.weather.experiments.osse.conftest import experiment
from tests.weather.training.conftest import FILTERS, StopAfter
from weather.baselines.optimal_interpolation import CorrectedInterpolation
from weather.experiments.osse import recorded_errors as cycled_problems
from weather.models.adas.analysis import AnalysisForm
from weather.training.adas_module import AdasModule
from weather.training.correction_module import CorrectionModule
from weather.training.stream import AssimilationDataModule, stack

pytestmark = FILTERS
ROWS, POOL, BLOCK = 2, 6, 3


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shorten(monkeypatch.setattr)


def shorten(replace=setattr):
    """Let few timelines be under way, in blocks of three cycles; half begin after an outage."""
    for name, value in (("POOL", POOL), ("BLOCK", BLOCK), ("OUTAGES", 0.5)):
        replace(cycled_problems, name, value)


def source_of(folder, seed=0, rows=ROWS):
    source = experiment(folder)
    source.train_correction("adas_oi", seed, rows)
    source.setup()
    return source


def module_of(folder, *, fresh=False):
    source = experiment(folder)
    start = AnalysisForm().load(Path(folder) / "weights/adas_increment-s0")
    model = AdasModule(
        start.network,
        [source.world.model, source.world.imperfect],
        loss="log_mae",
        learning_rate=1e-3,
        warmup=0.4,
    )
    return CorrectionModule.fresh(model, "ungated") if fresh else CorrectionModule.of(model, start)


def train(folder, *callbacks, steps=5, devices=1, ckpt_path=None):
    """Return a module after some steps of its training."""
    source = experiment(folder)
    source.train_correction("adas_oi", 0, ROWS)
    data = AssimilationDataModule(source, steps, ROWS, 1, 1)
    module = module_of(folder)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=devices, limit_val_batches=0, logger=False,
        strategy="ddp" if devices > 1 else "auto", gradient_clip_val=1.0, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def test_every_timeline_has_its_turn_and_time_passes_in_it(folder):
    source = source_of(folder)
    truth = source.world.truth("training")
    last = {}
    for turn in range(2 * BLOCK):
        found = [source.problem(POOL // ROWS * turn + step, row)
                 for step in range(POOL // ROWS) for row in range(ROWS)]  # fmt: skip
        assert sorted(int(one.timeline) for one in found) == list(range(POOL))
        assert all(bool(one.reset) for one in found) or turn
        for one in found:
            where = (truth == one.truth).flatten(2).all(-1).nonzero()[0].tolist()
            ahead = (truth == one.later).flatten(2).all(-1).nonzero()[0].tolist()
            assert ahead == [where[0] + 2, where[1]]
            time, member, reset = last.get(int(one.timeline), (None, None, True))
            assert bool(one.reset) or [time + 1, member] == where, (time, where, reset)
            last[int(one.timeline)] = (*where, bool(one.reset))


def test_problems_are_functions_of_seed_step_and_row(folder, refused):
    one, same, other = source_of(folder), source_of(folder), source_of(folder, seed=1)
    for step, row in ((7, 0), (2, 1)):
        left, right, else_ = (s.problem(step, row) for s in (one, same, other))
        assert torch.equal(left.background, right.background)
        assert torch.equal(left.observations.errors, right.observations.errors)
        assert not torch.equal(left.background, else_.background)
    refused("limit_val_batches to 0", one.problem, 0, 0, validation=True)


def test_timelines_begin_with_a_recorded_error_times_a_factor_or_after_an_outage(folder):
    source = source_of(folder)
    problems = source._problems
    assert set(problems.recordings) == {(m, sparse) for m in (0, 1) for sparse in (True, False)}
    factors, outages = [], 0
    for timeline in range(60):
        begun = problems._begin(timeline, 1)
        outages += begun.outage > 0
        assert 0 <= begun.outage <= BLOCK
        errors = torch.cat([r.errors for (model, _), r in problems.recordings.items()
                            if model == begun.model]).flatten(1)  # fmt: skip
        own = begun.error.flatten()
        scale = (errors @ own) / errors.square().sum(1)
        gaps = (errors * scale[:, None] - own).norm(dim=1) / own.norm()
        factors.append(float(scale[gaps.argmin()]))
        assert float(gaps.min()) < 1e-3
    assert 0.3 <= min(factors) < 0.6 < 1.5 < max(factors) <= 3.0
    assert 15 < outages < 45


def test_an_outage_is_a_forecast_of_the_start(folder):
    source = source_of(folder)
    problems = source._problems
    for step in range(3):
        found = source.problem(step, 0)
        begun = problems._begin(int(found.timeline), 0)
        start = problems.truth[begun.cycle, begun.member] + begun.error
        model = problems.forecasts[begun.model]
        hours = 6.0 * begun.outage
        expected = model(start[None], hours)[0] if begun.outage else start
        assert_close(found.background, expected)
        assert torch.equal(found.truth, problems.truth[begun.cycle + begun.outage, begun.member])


def attached(folder, **options):
    """Return a module with its data, without a training, and a batch."""
    module, source = module_of(folder, **options), source_of(folder)
    data = AssimilationDataModule(source, 5, ROWS, 1, 1)
    module._trainer = SimpleNamespace(
        datamodule=data, world_size=1, global_rank=0, precision="32-true"
    )
    module.setup("fit")
    module.log = lambda *_, **__: None
    return module, stack([source.problem(0, row) for row in range(ROWS)])


def test_the_correction_that_is_trained_is_the_one_that_is_scored(folder):
    module, batch = attached(folder)
    assert module.training
    analysis = module(batch, batch.background)
    for row in range(ROWS):
        one = stack([module.source.problem(0, row)])
        density = float(one.observations.mask[:, 0].float().mean())
        key = int(one.model), density < cycled_problems.SPARSE
        oi = module.source._problems.interpolations[key]
        method = CorrectedInterpolation(module.analysis, oi, alpha=0.5, beta=0.5)
        expected = method.analyze(one.background.unsqueeze(1), one.observations)[:, 0]
        assert_close(analysis[row : row + 1], expected, rtol=1e-4, atol=1e-2)
    assert analysis.requires_grad


def test_a_fresh_network_starts_as_interpolation(folder):
    module, batch = attached(folder, fresh=True)
    source = module.source
    assert module.analysis.guided
    assert not module.analysis.network.arguments["gated"]
    assert_close(module.analysis.normalizer.mean, source.normalizer.mean)
    analysis = module(batch, batch.background)
    expected = source.interpolated(batch, batch.background)
    assert_close(analysis, expected)
    assert not torch.equal(expected, batch.background)
    loss = module.loss_of(batch, analysis)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in module.analysis.network.recovery.parameters()])
    assert float(gradient.norm()) > 0
    row = source.over_start(module.analysis, None)
    assert row.value == pytest.approx(1.0, rel=1e-3)


def test_the_loss_is_that_of_the_analysis_and_of_its_forecast(folder):
    module, batch = attached(folder)
    analysis = batch.background.clone().requires_grad_()
    loss = module.loss_of(batch, analysis)
    models = [module.forecasts[int(model)] for model in batch.model]
    later = torch.cat([m(a[None], 12.0) for m, a in zip(models, batch.background, strict=True)])
    expected = module.against(batch.background, batch.truth) + module.against(later, batch.later)
    assert_close(loss.detach(), expected)
    (alone,) = torch.autograd.grad(module.against(analysis, batch.truth), analysis)
    (both,) = torch.autograd.grad(loss, analysis)
    assert float((both - alone).norm() / alone.norm()) > 0.1


def test_a_lost_timeline_begins_again_with_the_background_of_its_problem(folder):
    module, batch = attached(folder)
    far = batch.truth + 1.3 * 2**0.5 * module.climatological_sd[:, None, None]
    near = batch.truth + 1.1 * module.climatological_sd[:, None, None]
    module._carry(batch, torch.stack([far[0], near[1]]), "train")
    carried = module.carried["train"]
    assert len(carried) == POOL
    assert torch.equal(carried[batch.timeline[0]], batch.background[0])
    assert torch.equal(carried[batch.timeline[1]], near[1])


def test_a_killed_training_is_resumed_to_the_same_bits(folder, tmp_path):
    whole = train(folder)
    train(folder, StopAfter(2, tmp_path / "stopped.ckpt"))
    resumed = train(folder, ckpt_path=str(tmp_path / "stopped.ckpt"))
    start = AnalysisForm().load(folder / "weights/adas_increment-s0")
    moved = False
    for (name, left), (_, right), (_, first) in zip(
        whole.analysis.named_parameters(), resumed.analysis.named_parameters(),
        start.named_parameters(), strict=True,
    ):  # fmt: skip
        assert torch.equal(left, right), name
        moved |= not torch.equal(left, first)
    assert moved
    assert torch.equal(whole.carried["train"], resumed.carried["train"])


def trained_weights(parallel, folder):
    shorten()
    devices = 1 if parallel.strategy is None else 2
    return [p.detach().double() for p in train(folder, devices=devices).analysis.parameters()]


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(folder, two_ranks):
    trained = two_ranks(trained_weights, str(folder), tolerance=1e-6)
    start = (
        AnalysisForm().load(folder / "weights/adas_increment-s0").requires_grad_(False).parameters()
    )
    moved = [float((own - one).abs().max()) for own, one in zip(trained, start, strict=True)]
    assert max(moved) > 1e-4
