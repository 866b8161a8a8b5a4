import itertools
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from weather.training.adas_module import LOSSES, AdasModule
from weather.training.optimization import adamw_one_cycle, normalized_rmse
from weather.training.stream import AssimilationDataModule

from .conftest import FILTERS, Analyses, StopAfter

pytestmark = FILTERS


@pytest.fixture(scope="module")
def module_of(twin, small_adas):
    def build(network=None, **changes):
        forecasts = [twin.world.model, twin.world.imperfect]
        return AdasModule(network or small_adas(), **{"forecasts": forecasts} | changes)

    return build


@pytest.fixture(scope="module")
def fit(twin, train):
    def run(module, *callbacks, source=None, steps=12, timelines=4, **options):
        data = AssimilationDataModule(
            source or twin.source(),
            steps=steps,
            timelines=timelines,
            validation_steps=6,
            validation_timelines=2,
        )
        recorder = Analyses()
        train(module, data, recorder, *callbacks, **options)
        return recorder

    return run


@pytest.fixture(scope="module")
def whole(fit, module_of):
    """Twelve steps without validation."""
    return fit(module_of())


def attach(module, source, *, timelines=4):
    """Give a module its data without a training."""
    source.setup()
    data = AssimilationDataModule(source, timelines=timelines, validation_timelines=2)
    module._trainer = SimpleNamespace(
        datamodule=data, world_size=1, global_rank=0, precision="32-true"
    )
    module.setup("fit")
    module.log = lambda *_, **__: None
    return data


def batches(data, steps, **changes):
    loader = data.train_dataloader()
    return [batch._replace(**changes) for batch in itertools.islice(loader, steps)]


def test_stage_one_takes_recorded_backgrounds_and_stage_two_its_own_forecasts(whole, twin):
    world = twin.world
    forecasts = [world.model, world.imperfect]
    own = 0
    assert len(whole.batches) == 12
    for step, (batch, background) in enumerate(zip(whole.batches, whole.backgrounds, strict=True)):
        cycled = step >= 4 and (step - 4) % 5 != 0  # 4 recorded steps, then blocks of 5 cycles
        assert batch.reset.tolist() == [not cycled] * 4
        if not cycled:
            assert torch.equal(background, batch.background)
            continue
        previous = whole.analyses[step - 1]
        for row, model in enumerate(batch.model.tolist()):
            expected = forecasts[model](previous[row : row + 1], 6.0)[0]
            assert_close(background[row], expected, rtol=1e-6, atol=1e-3)
            assert not torch.equal(background[row], batch.background[row])
            own += 1
    assert own == 4 * (4 + 2)
    assert len({int(model) for batch in whole.batches for model in batch.model}) == 2


def test_the_second_cycle_depends_on_the_first_analysis_but_not_its_gradient(module_of, twin):
    module = module_of()
    first, second = batches(attach(module, twin.source(recorded_steps=0)), 2)
    nn.init.normal_(module.analysis.network.recovery.surface.weight, std=0.1)
    backgrounds, losses = [], []
    for observations in (first.observations, first.observations.withhold(torch.tensor(False))):
        module.carried.clear()
        module.zero_grad()
        module.training_step(first._replace(observations=observations), 0).backward()
        background = module.background(second, "train")
        assert not background.requires_grad
        assert not module.carried["train"].requires_grad
        losses.append(module.training_step(second, 1))
        backgrounds.append(background)
    assert not torch.allclose(backgrounds[0], backgrounds[1])
    assert losses[0] != losses[1]
    losses[1].backward()  # would ask for the freed graph of the first step if it reached back


def test_carried_states_are_kept_by_global_timeline(module_of, twin):
    module = module_of()
    attach(module, twin.source(recorded_steps=0))
    full = next(iter(module._data.train_dataloader()))
    rows = torch.tensor([3, 1])
    some = full._replace(
        **{
            name: getattr(full, name)[rows]
            for name in full._fields
            if name not in ("observations", "later")
        },
        observations=type(full.observations)(*(part[rows] for part in full.observations)),
    )
    analysis = module(some, some.background)
    module._carry(some, analysis, "train")
    assert torch.equal(module.carried["train"][rows], analysis)
    assert (module.carried["train"][[0, 2]] == 0).all()
    later = some._replace(reset=torch.zeros(2, dtype=torch.bool))
    expected = torch.cat(
        [
            module.forecasts[int(model)](row[None], 6.0)
            for model, row in zip(some.model, analysis, strict=True)
        ]
    )
    assert_close(module.background(later, "train"), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("distance", [torch.nan, 3.01])
def test_a_lost_analysis_returns_to_the_truth(module_of, twin, distance):
    module = module_of()
    first, _ = batches(attach(module, twin.source(recorded_steps=0)), 2)
    std = module.analysis.normalizer.std[:, None, None]
    analysis = first.background.clone()
    analysis[1:3] = first.truth[1:3] + torch.stack((distance * std, 2.99 * std))
    score = module._carry(first, analysis, "train")
    assert_close(score[1:3], torch.tensor([distance, 2.99]), equal_nan=True)
    analysis[1] = first.truth[1]
    assert torch.equal(module.carried["train"], analysis)


def test_a_forecast_that_blows_up_does_not_reach_the_weights(module_of, twin, small_adas):
    class Exploding(nn.Module):
        def forward(self, states, hours):
            states = states.clone()
            states[0] = torch.nan
            return states

    module = module_of(forecasts=[Exploding(), Exploding()])
    first, second = batches(attach(module, twin.source(recorded_steps=0)), 2)
    module.training_step(first, 0)
    background = module.background(second, "train")
    assert background.isfinite().all()
    for row in {int((second.model == number).nonzero()[0]) for number in second.model.tolist()}:
        assert torch.equal(background[row], second.truth[row])
    module.training_step(second, 1).backward()
    assert all(p.grad.isfinite().all() for p in module.analysis.parameters() if p.grad is not None)


def test_a_missing_forecast_model_is_named(module_of, twin, refused):
    module = module_of(forecasts=[twin.world.model])
    data = attach(module, twin.source(recorded_steps=0))
    first, second = batches(data, 2, model=torch.tensor([0, 1, 0, 0]))
    module.training_step(first, 0)
    refused(r"forecast model 1, but there are 1.*model\.forecasts", module.training_step, second, 1)


def test_carried_states_are_saved_and_taken_up_again(fit, module_of, whole, tmp_path):
    """The step after the resume is inside a block: without them there is nothing to forecast."""
    path = tmp_path / "stopped.ckpt"
    fit(module_of(), StopAfter(7, path))
    assert torch.equal(torch.load(path, weights_only=True)["carried"], whole.analyses[6])
    resumed = fit(module_of(), ckpt_path=path)
    assert len(resumed.batches) == 12 - 7
    assert torch.equal(resumed.backgrounds[0], whole.backgrounds[7])
    assert_close(resumed.analyses, whole.analyses[7:], rtol=0, atol=0)
    weights = [dict(x.named_parameters()) for x in (resumed.module, whole.module, module_of())]
    assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not any(torch.equal(weights[1][name], first) for name, first in weights[2].items())


def test_another_number_of_timelines_is_refused(module_of, twin, refused):
    module = module_of()
    attach(module, twin.source(), timelines=2)
    refused(
        r"carries 4 timelines, the data has 2.*data\.timelines 4",
        module.on_load_checkpoint,
        {"carried": torch.zeros(4, 3, 16, 32)},
    )


def test_validation_cycles_the_analysis_from_the_first_background(fit, module_of, twin):
    """Against a cycle written out by hand, after a sanity check that drops its pass half way."""
    module, source, errors = module_of(), twin.source(), []
    logged = fit(module, steps=6, num_sanity_val_steps=2, limit_val_batches=1.0)
    logged = logged.trainer.callback_metrics
    source.setup()
    for timeline in range(2):
        state = None
        for step in range(6):
            problem = source.problem(step, timeline, validation=True)
            background = problem.background if state is None else twin.world.model(state, 6.0)[0]
            batched = type(problem.observations)(*(part[None] for part in problem.observations))
            state = module.analysis.eval()(background[None], batched, problem.background_sd[None])
            state = state.detach()
            errors.append(state[0] - problem.truth)
    area, std = twin.world.grid.area_weights(), source.normalizer.std
    score = normalized_rmse(torch.stack(errors), std, area).mean()
    assert_close(float(logged["val/score"]), float(score), rtol=1e-4, atol=1e-5)
    rms = twin.world.grid.area_mean(torch.stack(errors).square()).sqrt().mean(0)
    found = [float(logged[f"val/rmse_{label}"]) for label in twin.world.channels.labels]
    assert_close(torch.tensor(found), rms.float(), rtol=1e-3, atol=1e-2)
    assert float(logged["val/lost"]) == 0


def test_validation_leaves_the_training_cycle_alone(fit, module_of, whole):
    with_validation = fit(module_of(), val_check_interval=3, limit_val_batches=1.0)
    pairs = zip(with_validation.analyses, whole.analyses, strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_units_come_from_the_data_and_go_into_the_checkpoint(fit, module_of, twin, tmp_path):
    module = module_of()
    seen = fit(module, steps=2)
    source = twin.source()
    source.setup()
    assert torch.equal(module.analysis.background_sd, source.background_sd)
    assert torch.equal(module.analysis.normalizer.mean, source.normalizer.mean)
    assert torch.equal(module.analysis.normalizer.std, source.normalizer.std)
    seen.trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["analysis.background_sd"], source.background_sd)
    assert not any(key.startswith("forecasts") for key in state)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("lat_weight", [False, True])
def test_the_loss_is_the_one_asked_for(module_of, twin, name, lat_weight):
    module = module_of(loss=name, lat_weight=lat_weight)
    (batch,) = batches(attach(module, twin.source()), 1)
    loss = module.training_step(batch, 0)
    units = module.analysis.normalizer
    error = (units.normalize(batch.background) - units.normalize(batch.truth)).detach()
    error = error.abs() if "mae" in name else error.square()  # an increment starts at zero
    if lat_weight:
        error = error * twin.world.grid.area_weights().float()[:, None]
    each = error.mean((2, 3))
    expected = each[:, 0].mean() if "unify" in name else (each + 1e-6).log().mean()
    assert_close(loss.detach(), expected)
    loss.backward()
    assert module.analysis.network.recovery.surface.weight.grad.abs().max() > 0


def test_schedule_and_optimizer_are_those_of_the_recipe(fit, module_of):
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = module_of(learning_rate=2e-3, weight_decay=0.03, betas=(0.8, 0.9), warmup=0.25)
    seen = fit(module, Watch(), steps=9)
    group = seen.trainer.optimizers[0].param_groups[0]
    assert isinstance(seen.trainer.optimizers[0], torch.optim.AdamW)
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.9), 0.03)
    assert len(rates) == 9
    assert_close(rates[0], 2e-5)
    assert max(rates) <= 2e-3
    assert rates.index(max(rates)) in (1, 2)
    assert_close(rates[-1], 2e-9, rtol=1e-3, atol=0)


def test_variants_are_fresh_networks_of_the_same_recipe(module_of, refused):
    recipe = {"loss": "log_mse", "lat_weight": True, "divergence_limit": 2.0, "betas": (0.5, 0.6)}
    module = module_of(**recipe, confidence_scale=0.3, background_error="innovation")
    for form, gated, output in (
        ("adas_increment", True, "increment"),
        ("adas_official", True, "analysis"),
        ("ungated", False, "increment"),
    ):
        variant = module.variant(form, weight_decay=0.2)
        arguments = variant.analysis.network.arguments
        assert (arguments["gated"], arguments["output"]) == (gated, output)
        assert variant.loss is LOSSES["log_mse"]
        assert (variant.lat_weight, variant.divergence_limit) == (True, 2.0)
        assert (variant.weight_decay, variant.learning_rate) == (0.2, module.learning_rate)
        assert (variant.betas, variant.analysis.confidence_scale) == ((0.5, 0.6), 0.3)
        assert variant.analysis.background_error == "innovation"
        assert not {id(p) for p in module.parameters()} & {id(p) for p in variant.parameters()}
    assert module.variant("ungated", learning_rate=0.5).learning_rate == 0.5
    refused("learning_rat", module.variant, "ungated", learning_rat=0.5, error=TypeError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_shape": (16, 16)}, r"grid_shape is \(16, 16\), the data has \(16, 32\)"),
        ({"num_surface": 4}, "num_surface is 4, the data has 3"),
        ({"num_upper": 1, "num_levels": 2}, "num_upper is 1, the data has 0"),
    ],
)
def test_data_of_another_grid_or_other_channels_is_refused(
    module_of, twin, small_adas, changes, message, refused
):
    module = module_of(small_adas(**changes))
    refused(rf"model\.network\.{message}: set it to that", attach, module, twin.source())


@pytest.mark.parametrize(("steps", "warmup"), [(2, 0.5), (5, 0.2), (10, 0.1), (8, 0.3)])
def test_the_learning_rate_rises_to_its_peak_even_in_one_step(steps, warmup):
    weight = torch.nn.Parameter(torch.ones(1))
    found = adamw_one_cycle(
        [weight], steps, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.0, warmup=warmup
    )
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        if len(rates) < steps:
            schedule.step()
    assert max(rates) <= 0.1
    assert max(rates) > 0.09
    assert rates[-1] == min(rates) < 1e-6
