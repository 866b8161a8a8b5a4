"""Training of FengWu, its buffer of forecasts, and of Adas with a model of two frames."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from weather.experiments.twin.trajectories import NatureTrajectories
from weather.models.fengwu.network import fengwu_preset
from weather.training.adas_module import AdasModule
from weather.training.forecast_module import FengWuModule, ReplayBuffer, Underway
from weather.training.optimization import gaussian_loss
from weather.training.stream import AssimilationDataModule, ForecastDataModule

from .conftest import FILTERS, Analyses, StopAfter

pytestmark = FILTERS
SHAPE = (1, 2, 2)


def buffer(**changes):
    arguments = {"rows": 2, "slots": 3, "max_lead": 4, "fraction": 0.5, "seed": 0} | changes
    return ReplayBuffer(arguments.pop("rows"), arguments.pop("slots"), SHAPE, **arguments)


def underway(value, lead=1, member=0, time=5):
    return Underway(torch.full((2, *SHAPE), float(value)), member, time, lead)


def test_an_empty_buffer_gives_the_data(refused):
    assert all(buffer(fraction=0.99).draw(step, 0) is None for step in range(50))
    refused("slot 1 of row 0 is empty", buffer().at, 0, 1, error=ValueError)


def test_a_forecast_comes_back_as_it_was():
    kept = buffer()
    kept.keep(0, 1, None, underway(3.0, lead=2, member=7, time=11))
    found = kept.at(1, int(kept.lead[1].nonzero()))
    assert found[1:] == (7, 11, 2)
    assert torch.equal(found.frames, torch.full((2, *SHAPE), 3.0))
    assert not kept.lead[0].any()  # rows do not exchange


def test_new_forecasts_fill_empty_slots_before_they_replace():
    kept = buffer()
    for value in range(3):
        kept.keep(value, 0, None, underway(value))
    assert sorted(kept.frames[0, :, 0, 0, 0, 0].tolist()) == [0, 1, 2]
    kept.keep(3, 0, None, underway(9))
    values = kept.frames[0, :, 0, 0, 0, 0].tolist()
    assert (len(values), values.count(9)) == (3, 1)


def test_a_continued_forecast_stays_in_its_slot_until_it_expires():
    kept = buffer()
    kept.keep(0, 0, 1, underway(1, lead=4))
    assert kept.lead[0].tolist() == [0, 4, 0]
    kept.keep(1, 0, 1, underway(2, lead=5))
    assert not kept.lead.any()
    kept.keep(2, 0, 1, underway(1))
    kept.drop(0, 1)
    kept.drop(0, None)
    assert not kept.lead.any()


def test_the_fraction_of_draws():
    kept = buffer(fraction=0.3)
    for value in range(3):
        kept.keep(value, 0, None, underway(value))
    draws = [kept.draw(step, 0) for step in range(2000)]
    taken = [slot for slot in draws if slot is not None]
    assert len(taken) / len(draws) == pytest.approx(0.3, abs=0.03)
    for slot in range(3):
        assert taken.count(slot) / len(taken) == pytest.approx(1 / 3, abs=0.06)
    assert draws == [kept.draw(step, 0) for step in range(2000)]
    other = buffer(fraction=0.3, seed=1)
    other.load_state_dict(kept.state_dict())
    assert draws != [other.draw(step, 0) for step in range(2000)]


def test_content_survives_a_checkpoint(refused):
    kept = buffer()
    for step in range(5):
        for row in range(2):
            kept.keep(step, row, kept.draw(step, row), underway(step + row, lead=step % 3 + 1))
    state = {name: value.clone() for name, value in kept.state_dict().items()}
    again = buffer()
    again.load_state_dict(state)
    kept.keep(9, 0, 0, underway(99))
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name])
    refused(
        r"2 rows with 3 slots, this run has 2 with 4.*slots 3",
        buffer(slots=4).load_state_dict,
        state,
    )


@pytest.mark.parametrize(
    "change", [{"rows": 0}, {"slots": 0}, {"max_lead": 0}, {"fraction": 1.0}, {"fraction": -0.1}]
)
def test_impossible_numbers(change, refused):
    refused(next(iter(change)), buffer, **change, error=ValueError)


class Recorder(L.Callback):
    """Keeps from where every step started, and its loss."""

    def __init__(self):
        self.starts, self.losses = [], []

    def setup(self, trainer, module, stage):
        self.trainer, original = trainer, module.start

        def start(batch):
            self.starts.append(original(batch))
            return self.starts[-1]

        module.start = start

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def module_of(seed=0, **changes):
    torch.manual_seed(seed)
    network = fengwu_preset("unit", dim=4, depths=(1, 1), fuser_depth=1)
    return FengWuModule(network, **{"replay": 0.7, "slots": 2, "max_lead": 3} | changes)


@pytest.fixture(scope="module")
def fit(twin, train):
    def run(module, *callbacks, steps=12, **options):
        source = NatureTrajectories(twin.world)
        data = ForecastDataModule(source, steps=steps, timelines=3, validation_timelines=2)
        recorder = Recorder()
        train(module, data, recorder, *callbacks, **options)
        return recorder

    return run


def test_the_likelihood_of_a_normal_distribution(refused):
    torch.manual_seed(0)
    mean, log_variance, target = torch.randn(3, 2, 2, 4, 5, dtype=torch.float64).unbind(0)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = -normal.log_prob(target).mean() - torch.tensor(2 * torch.pi).log() / 2
    assert_close(gaussian_loss(mean, log_variance, target), expected.double(), atol=1e-6, rtol=0)
    weights = torch.tensor([2.0, 0, 0, 2], dtype=torch.float64)
    ends = [x[:, :, ::3] for x in (mean, log_variance, target)]
    weighted = gaussian_loss(mean, log_variance, target, area_weights=weights)
    assert_close(weighted, gaussian_loss(*ends))
    inputs = (mean.requires_grad_(), log_variance.requires_grad_(), target)
    assert torch.autograd.gradcheck(gaussian_loss, inputs)
    refused("must all be", gaussian_loss, mean, log_variance[:, :1], target, error=ValueError)


def test_samples_are_successive_states_of_training_members(twin, refused):
    source = NatureTrajectories(twin.world)
    source.setup()
    states = twin.world.states("training")
    seen = set()
    for step in range(40):
        sample = source.problem(step, 1)
        member, time = int(sample.member), int(sample.time)
        seen.add((member, time))
        for offset, frame in enumerate((sample.previous, sample.current, sample.following)):
            assert torch.equal(frame, states[time - 1 + offset, member])
    assert len(seen) > 30
    assert torch.equal(source.problem(3, 1).current, source.problem(3, 1).current)
    assert not torch.equal(source.problem(3, 1).current, source.problem(3, 2).current)
    held_out = source.problem(0, 0, validation=True)
    validation = twin.world.states("validation")
    assert torch.equal(held_out.current, validation[int(held_out.time), int(held_out.member)])
    assert source.training_objects() == twin.world.objects("training", "validation")
    refused(
        "do not fit into 24 cycles",
        NatureTrajectories,
        twin.world,
        validation_leads=25,
        error=ValueError,
    )


def test_increments_have_unit_size(twin):
    source = NatureTrajectories(twin.world)
    source.setup()
    states = twin.world.states("training")
    scaled = (states[1:] - states[:-1]) / source.increment_sd[:, None, None]
    size = twin.world.grid.area_mean(scaled.square()).mean((0, 1)).sqrt()
    assert_close(size, torch.ones_like(size), rtol=0.1, atol=0)


def test_rows_of_the_buffer_go_on_with_their_own_forecasts(fit, twin):
    recorder = fit(module_of(one_step=2, cold_start=0.0), steps=14)
    states = twin.world.states("training")
    assert all(slot is None for start in recorder.starts[:2] for slot in start.slots)
    replayed, longest = 0, 0
    for start in recorder.starts:
        for index, lead in enumerate(start.leads):
            member, time = int(start.batch.member[index]), int(start.batch.time[index])
            assert torch.equal(start.batch.following[index], states[time + 1, member])
            assert torch.equal(start.batch.current[index], states[time, member]) is (lead == 0)
            earlier = torch.equal(start.batch.previous[index], states[time - 1, member])
            assert earlier is (lead < 2)  # a forecast of one step has a state before it
            replayed += lead > 0
            longest = max(longest, lead)
    assert replayed > 8
    assert longest == 3  # max_lead


def test_what_goes_into_the_buffer_is_the_forecast_of_that_step(fit, twin):
    module = module_of(replay=0.99, slots=1, max_lead=9, learning_rate=1e-12, cold_start=0.0)
    nn.init.normal_(module.forecast.network.decoders[0].recovery.weight, std=0.05)
    first, second = fit(module, steps=4).starts[:2]
    assert second.leads == [1, 1, 1]
    with torch.no_grad():
        expected = module.forecast(first.batch.current, 6.0, first.batch.previous)
    assert_close(second.batch.current, expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(second.batch.previous, first.batch.current)
    assert not torch.allclose(expected, first.batch.current)


def test_a_forecast_that_has_left_the_truth_is_given_up(fit):
    recorder = fit(module_of(replay=0.99, divergence_limit=1e-9), steps=6)
    assert all(lead == 0 for start in recorder.starts for lead in start.leads)


def test_cold_starts_repeat_the_current_frame(fit):
    recorder = fit(module_of(replay=0.0, cold_start=0.5), steps=20)
    cold = [
        torch.equal(previous, current)
        for start in recorder.starts
        for previous, current in zip(start.batch.previous, start.batch.current, strict=True)
    ]
    assert 0.25 < sum(cold) / len(cold) < 0.75


def test_a_resumed_training_takes_the_same_steps(fit, tmp_path):
    unbroken, resumed, path = module_of(), module_of(seed=5), tmp_path / "stopped.ckpt"
    whole = fit(unbroken)
    fit(module_of(), StopAfter(7, path))
    rest = fit(resumed, ckpt_path=path)
    assert whole.losses[7:] == rest.losses
    assert any(lead for start in rest.starts for lead in start.leads)
    for one, other in ((unbroken, resumed), (unbroken.buffer, resumed.buffer)):
        assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["replay"]
    torch.save(checkpoint, path)
    assert fit(module_of(), ckpt_path=path).losses != rest.losses


def test_training_learns_to_forecast(fit):
    module = module_of(replay=0.3, learning_rate=5e-3, slots=2, cold_start=0.1)
    recorder = fit(module, steps=60)
    first, last, trainer = recorder.losses[:6], recorder.losses[-6:], recorder.trainer
    assert sum(last) / 6 < sum(first) / 6 - 0.2
    trainer.limit_val_batches = 1.0
    scores = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)[0]
    assert scores["val/score_6h"] < scores["val/persistence_6h"]
    assert scores["val/score_24h"] < scores["val/persistence_24h"]


def test_another_shape_is_refused(fit, twin, refused):
    torch.manual_seed(0)
    wrong = FengWuModule(fengwu_preset("unit", grid_shape=(32, 64)))
    refused(r"grid_shape is \(32, 64\), the data has \(16, 32\)", fit, wrong)
    refused("learning_rate", module_of, learning_rate=0.0, error=ValueError)


class Damped(nn.Module):
    """Goes half of the last step further; what it was given is recorded."""

    frames, step_hours = 2, 6.0

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, states, hours, previous=None):
        self.given.append((states.clone(), previous.clone()))
        return states + 0.5 * (states - previous)


@pytest.fixture(scope="module")
def fit_adas(twin, small_adas, train):
    def run(*callbacks, ckpt_path=None, divergence_limit=1e9):
        model, recorder = Damped(), Analyses()
        options = {"divergence_limit": divergence_limit}
        module = AdasModule(small_adas(), forecasts=[model, model], **options)
        data = AssimilationDataModule(
            twin.source(), steps=12, timelines=4, validation_steps=1, validation_timelines=2
        )
        train(module, data, recorder, *callbacks, ckpt_path=ckpt_path)
        return recorder, model, module

    return run


@pytest.fixture(scope="module")
def two_frames(fit_adas):
    """Twelve steps, no analysis of which is lost."""
    return fit_adas()


def test_a_forecast_gets_the_last_two_analyses_of_its_timeline(two_frames):
    recorder, model, _ = two_frames
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


def test_a_timeline_that_begins_again_from_the_truth_has_no_earlier_state(fit_adas, tmp_path):
    # Every analysis is lost.
    _, model, _ = fit_adas(StopAfter(8, tmp_path / "stopped.ckpt"), divergence_limit=1e-9)
    assert model.given
    for states, previous in model.given:
        assert torch.equal(states, previous)


def test_both_analyses_are_taken_up_again(fit_adas, two_frames, tmp_path):
    unbroken, _, module = two_frames
    path = tmp_path / "stopped.ckpt"
    fit_adas(StopAfter(7, path))  # inside a block
    saved = torch.load(path, weights_only=True)
    assert not torch.equal(saved["before"], saved["carried"])
    rest, _, resumed = fit_adas(ckpt_path=path)
    assert len(rest.analyses) == 5
    assert_close(rest.analyses, unbroken.analyses[7:], rtol=0, atol=0)
    assert_close([*module.parameters()], [*resumed.parameters()], rtol=0, atol=0)
    del saved["before"]
    torch.save(saved, path)
    forgetful, _, _ = fit_adas(StopAfter(8, path), ckpt_path=path)
    assert not torch.equal(forgetful.analyses[0], unbroken.analyses[7])


def test_models_of_one_state_leave_nothing_behind(twin, small_adas):
    assert AdasModule(small_adas(), forecasts=[twin.world.model]).before == {}
