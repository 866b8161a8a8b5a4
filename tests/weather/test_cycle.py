"""Cycles of forecasts and analyses, of models of one state and of two, and of reports."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from core_gates import GatesError
from weather import LETKF, OptimalInterpolation
from weather.assimilation import Reports, WhereObserved, by_channel
from weather.baselines import Climatology, FreeRun, InverseDistance, SampleCovariance
from weather.cycle import Cycle, FramesForecast, advance, diverged
from weather.grid import gaussian_grid, regular_grid
from weather.observations.gridded import GriddedObservations, gross_check
from weather.observations.operators import BackgroundFrames
from weather.observations.report_table import ObservationTable
from weather.observations.simulated import bernoulli_network, observe, simulate_table
from weather.state import ERA5_SAMPLE, ChannelSpec

GRID = gaussian_grid(6, 12)


def forecast(states, hours):
    """Rotate eastwards, with a weak non-linearity."""
    assert states.ndim == 4
    return states.roll(1, -1) + hours / 60 * states.sin()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def optimal_interpolation():
    samples = torch.randn(30, 2, *GRID.shape, generator=generator(1))
    return OptimalInterpolation(SampleCovariance(samples, GRID, localization_km=3000.0))


METHODS = {
    "free run": FreeRun,
    "inverse distance": partial(InverseDistance, GRID),
    "optimal interpolation": optimal_interpolation,
    "letkf": partial(LETKF, GRID, 4, localization_km=3000.0, inflation=1.1, relaxation=0.3),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]()


def start(members):
    return torch.randn(2, members, 2, *GRID.shape, generator=generator(2))


def observations(steps, *, error=0.1, absent=()):
    network = bernoulli_network(GRID, 0.5, seed=3)
    for step in range(steps):
        draw = generator(10 + step)
        truth = torch.randn(2, 2, *GRID.shape, generator=draw)
        seen = observe(truth, network, torch.full((2,), error), generator=draw)
        yield seen.withhold(torch.tensor(step not in absent))


def test_without_observations_the_cycle_is_the_free_run(method):
    first = start(method.members)
    nothing = observations(3, absent=range(3))
    states = first.flatten(0, 1)
    for number, step in enumerate(Cycle(forecast, method, 12.0).run(first, nothing)):
        states = states if number == 0 else forecast(states, 12.0)
        assert torch.equal(step.background, states.view_as(first))
        assert torch.equal(step.analysis, states.view_as(first))
    assert number == 2


def test_the_second_cycle_starts_from_the_first_analysis(method):
    first = start(method.members)
    seen = list(observations(2))
    without_first = [seen[0].withhold(torch.tensor(False)), seen[1]]
    cycle = Cycle(forecast, method)
    with_all, with_less = (list(cycle.run(first, each)) for each in (seen, without_first))
    expected = forecast(with_all[0].analysis.flatten(0, 1), 6.0)
    assert torch.equal(with_all[1].background, expected.view_as(first))
    assert torch.equal(with_all[1].analysis, with_less[1].analysis) is isinstance(method, FreeRun)


def test_an_outage_is_a_pause_of_the_analysis(method):
    steps = list(Cycle(forecast, method).run(start(method.members), observations(4, absent=[2])))
    assert torch.equal(steps[2].analysis, steps[2].background)
    same = [torch.equal(step.analysis, step.background) for step in (steps[1], steps[3])]
    assert same == [isinstance(method, FreeRun)] * 2


def test_a_poisoned_observation_is_rejected_by_quality_control():
    first, method = start(1), optimal_interpolation()
    seen = list(observations(1, error=1.0))
    where = tuple(seen[0].mask.nonzero()[7].tolist())
    poisoned = seen[0]._replace(values=seen[0].values.clone())
    poisoned.values[where] = 1e6
    check = partial(gross_check, sigma_b=torch.ones(2), factor=8.0)
    clean = seen[0].withhold(
        torch.ones_like(seen[0].mask).index_put(
            tuple(torch.tensor(i) for i in where), torch.tensor(False)
        )
    )

    def analyze(given, **options):
        return next(iter(Cycle(forecast, method, **options).run(first, [given])))

    accepted = analyze(poisoned, quality_control=check)
    assert not accepted.observations.mask[where]
    assert accepted.observations.mask.sum() == seen[0].mask.sum() - 1
    assert torch.equal(accepted.analysis, analyze(clean).analysis)
    assert analyze(poisoned).analysis.abs().max() > 1e4


def test_the_mean_background_is_what_quality_control_sees():
    first = start(4)
    means = []

    def check(given, background):
        means.append(background)
        return given

    list(Cycle(forecast, FreeRun(4), quality_control=check).run(first, observations(1)))
    assert_close(means[0], first.mean(1))


def test_a_caller_may_replace_an_analysis():
    first = start(1)
    steps = Cycle(forecast, optimal_interpolation()).run(first, observations(2))
    next(steps).analysis[1] = 7.0
    assert torch.equal(next(steps).background[1], forecast(torch.full_like(first[1], 7.0), 6.0))


def test_no_forecast_is_wasted():
    calls = []

    def counted(states, hours):
        calls.append((tuple(states.shape), hours))
        return states

    list(Cycle(counted, FreeRun(3), 3.0).run(start(3), observations(4)))
    assert calls == [((6, 2, *GRID.shape), 3.0)] * 3


def test_divergence_is_per_timeline():
    states = torch.zeros(5, 2, 4, 4)
    states[1, 0] = 1.4 * 3  # below the limit of the first channel
    states[2, 1] = -1.6 * 0.5
    states[3, 0, 0, 0] = torch.nan
    states[4, 1, 2, 1] = torch.inf
    sd = torch.tensor([3.0, 0.5])
    assert diverged(states, sd).tolist() == [False, False, True, True, True]
    assert diverged(states, sd, limit=1.0).tolist() == [False, True, True, True, True]


def test_observations_may_be_any_iterable_of_fields():
    absent = GriddedObservations.absent((2, 2, *GRID.shape))
    assert len(list(Cycle(forecast, FreeRun()).run(start(1), iter([absent] * 3)))) == 3
    assert list(Cycle(forecast, FreeRun()).run(start(1), [])) == []


SHAPE = (2, 1, 1, 2, 4)  # B, M, C, H, W


class Extrapolation:
    """x + (x - previous); what it was given is recorded."""

    frames, step_hours = 2, 6.0

    def __init__(self):
        self.given = []

    def __call__(self, states, hours, previous=None):
        self.given.append(previous)
        return 2 * states - (states if previous is None else previous)


class Halfway:
    """Moves the background half of the way to the observations."""

    members = 1

    def analyze(self, background, observations):
        return (background + observations.values[:, None]) / 2


def truth(count):
    return [torch.full((2, 1, 2, 4), float(t * t)) for t in range(count)]


def observed(count):
    return [GriddedObservations(x, torch.ones_like(x)) for x in truth(count)]


def test_the_last_two_analyses_start_the_forecast():
    model = Extrapolation()
    steps = list(Cycle(model, Halfway()).run(torch.zeros(SHAPE), observed(4)))
    analyses = [step.analysis for step in steps]
    assert model.given[0] is None
    for given, analysis in zip(model.given[1:], analyses, strict=False):
        assert_close(given, analysis.flatten(0, 1), rtol=0, atol=0)
    assert_close(steps[1].background, analyses[0])
    assert_close(steps[3].background, 2 * analyses[2] - analyses[1])
    assert not torch.equal(steps[3].background, analyses[2])


def test_a_cycle_goes_on_where_it_was_left():
    whole = list(Cycle(Extrapolation(), Halfway()).run(torch.zeros(SHAPE), observed(6)))
    last, before = whole[2].analysis, whole[1].analysis
    model = Extrapolation()
    background = advance(model, last.flatten(0, 1), 6.0, before.flatten(0, 1)).reshape(SHAPE)
    rest = list(Cycle(model, Halfway()).run(background, observed(6)[3:], previous=last))
    for one, other in zip(rest, whole[3:], strict=True):
        assert torch.equal(one.analysis, other.analysis)
    without = list(Cycle(model, Halfway()).run(background, observed(6)[3:]))
    assert not torch.equal(without[1].analysis, whole[4].analysis)


def test_what_a_caller_replaces_is_also_the_earlier_frame():
    model = Extrapolation()
    for number, step in enumerate(Cycle(model, Halfway()).run(torch.zeros(SHAPE), observed(3))):
        if number == 0:
            step.analysis[1] = 7.0
    assert float(model.given[1][1].max()) == 7.0


@pytest.mark.parametrize(("hours", "given"), [(6.0, True), (3.0, False), (12.0, False)])
def test_frames_of_another_distance_are_not_given(hours, given):
    model = Extrapolation()
    x = torch.ones(1, 1, 2, 4)
    advance(model, x, hours, x / 2)
    assert (model.given[0] is not None) is given


def test_models_of_one_state_are_called_with_one():
    frames = [isinstance(model, FramesForecast) for model in (forecast, Extrapolation())]
    assert frames == [False, True]
    x = torch.ones(1, 1, 2, 4)
    assert torch.equal(advance(forecast, x, 6.0, x), forecast(x, 6.0))


COARSE = regular_grid(12, 24, poles=False)
CHANNELS = ChannelSpec((), ("temperature",), (500,))
NOON = np.datetime64("2020-01-01T12", "ns")


def field(warm=30.0):
    """Colder northwards, so that the hemispheres differ."""
    return (260 - warm * COARSE.latitude.deg2rad().sin()).float()[None, :, None].expand(1, 12, 24)


def table(field, count=200, error=0.5):
    sd = torch.tensor([error])
    return simulate_table(field, COARSE, CHANNELS, time=NOON, count=count, error_sd=sd, seed=0)


def reports(frame, *, sd=2.0, **changes):
    given = ObservationTable.from_frame(frame)
    return Reports(given, COARSE, CHANNELS, torch.tensor([sd]), **changes)


def test_good_reports_are_taken_without_a_warning():
    background = field() + 1
    made = reports(table(field()).frame)
    assert (made.observed, made.rejected) == ([int(made.at(NOON, background).mask.sum())], [0])
    assert made.warning() == made.misfit() == ""


@pytest.mark.fault("46 W default")
def test_departures_that_the_errors_do_not_let_expect_are_said():
    background, frame = field(), table(field()).frame
    for sd, far in ((0.5, False), (20.0, True), (0.1, False)):
        made, again = reports(frame, sd=sd), reports(frame, sd=sd)
        passed = made.at(NOON, background)
        squares = (passed.values - background)[passed.mask].square()
        expected = (squares / (sd**2 + passed.errors[passed.mask].square())).mean().sqrt()
        assert made.departures().tolist() == [pytest.approx(float(expected), rel=1e-5)]
        assert (f"{float(expected):.2f} (" in made.misfit()) == far
        again.restore(made.state())
        assert again.misfit() == made.misfit()


@pytest.mark.fault("weather Bc")
def test_flipped_latitudes_are_named():
    frame = table(field()).frame
    made = reports(frame.assign(latitude=-frame["latitude"]))
    made.at(NOON, field() + 1)
    line = made.warning()
    assert line.startswith(f"warning: {made.rejected[0]} of {made.observed[0]} observed cells are")
    assert line.endswith("latitudes of the wrong sign, with which only 0 would be")
    assert "\n" not in line


@pytest.mark.fault("weather Bc")
def test_other_causes_of_many_rejections_are_named():
    made = reports(table(field() + 40).frame)
    made.at(NOON, field())
    assert made.rejected == made.observed
    for cause in ("units", "latitudes", "time"):
        assert cause in made.warning()


@pytest.mark.fault("46 W3")
@pytest.mark.parametrize(
    ("count", "bad", "guessed"), [(18, 4, False), (18, 18, False), (60, 12, False), (60, 24, True)]
)
def test_few_rejections_are_counted_and_no_cause_is_guessed(count, bad, guessed):
    """Four rejected cells with right latitudes say nothing of latitudes."""
    frame = table(field(), count).frame
    frame.loc[: bad - 1, "value"] -= 60
    made = reports(frame)
    made.at(NOON, field())
    rejected, observed = made.rejected[0], made.observed[0]
    assert (observed >= 20 and rejected >= 0.3 * observed) == guessed
    said = f"warning: {rejected} of {observed} observed cells are rejected by the gross check"
    assert rejected > 3
    assert made.warning().startswith(said)
    assert (made.warning() == said) is not guessed


@pytest.mark.parametrize("count", [5, 200])
def test_a_channel_that_loses_every_observation_is_refused(count, refused):
    """A background or reports in another unit; a handful may all be wrong by chance."""
    made = reports(table(field() + 40, count).frame)
    made.at(NOON, field())
    if count < 10:
        made.require_plausible()
    else:
        refused(rf"rejects all {made.observed[0]} .* cells of t500", made.require_plausible)
    some = reports(table(field(), count).frame)
    some.at(NOON, field())
    some.require_plausible()


def test_a_few_bad_reports_are_no_reason_to_warn():
    frame = table(field()).frame
    frame.loc[:1, "value"] += 60
    made = reports(frame)
    passed = made.at(NOON, field())
    away = torch.where(passed.mask[0], passed.values[0] - field(), 0)
    assert away.abs().max() < 3  # the good ones, where they were reported
    assert (made.rejected, made.warning()) == ([2], "")


@pytest.mark.fault("weather Bb")
def test_a_background_is_not_altered_by_nothing():
    background = field()[None, None] + 1
    method = WhereObserved(Climatology(torch.zeros(1, 12, 24)))
    nothing = GriddedObservations.absent((1, 1, 12, 24))
    found = method.analyze(background, nothing)
    assert torch.equal(found, background)
    assert found.data_ptr() != background.data_ptr()
    one = nothing.values.clone()
    seen = GriddedObservations(one, torch.ones_like(one))
    assert not torch.equal(method.analyze(background, seen), background)


def test_backgrounds_are_analyzed_at_their_own_times():
    states = torch.stack((field(), field()))
    times = np.array([NOON - np.timedelta64(12, "h"), NOON])
    found = reports(table(field() + 1).frame).analyze(InverseDistance(COARSE), states, times)
    assert torch.equal(found.states[0], states[0])
    assert (found.states[1] - states[1] - 1).abs().mean() < 0.5
    assert (found.observed[0], found.rejected) == (0, [0, 0])


def test_representativeness_adds_to_the_errors_of_cells():
    made = reports(table(field()).frame, representativeness=torch.tensor([3.0]))
    assert made.at(NOON, field()).errors.min() >= 3


def test_numbers_by_variable(refused):
    default = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = by_channel({"temperature": 0.5}, ERA5_SAMPLE, default, "background_error")
    assert found.tolist() == [1, 2, 0.5, 0.5]
    assert default.tolist() == [1, 2, 3, 4]
    for wrong in ({"temperatur": 0.5}, {"temperature": -1.0}, {"temperature": float("nan")}):
        refused(
            r"--background_error .* positive numbers for geopot",
            by_channel,
            wrong,
            ERA5_SAMPLE,
            default,
            "background_error",
        )


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: reports(table(field()).frame, sd=0.0), "positive"),
        (lambda: reports(table(field()).frame, sd=float("nan")), "positive"),
        (lambda: reports(table(field()).frame, factor=0.0), "positive"),
        (
            lambda: reports(soundings(), observation_operator="nearest"),
            "'nearest' is unknown, expected nearest_cell, interp",
        ),
        (
            lambda: next(Cycle(forecast, METHODS["letkf"]()).run(start(1), observations(1))),
            "works with 4 members",
        ),
    ],
)
def test_what_does_not_fit_is_refused(refused, words):
    with pytest.raises((GatesError, ValueError), match=words):
        refused()


def ramp(hours=0.0):
    """A field that is linear in longitude away from the seam, and in time."""
    return (250 + 0.1 * COARSE.longitude.float() + 0.5 * hours).expand(1, 12, 24).clone()


def soundings(**columns):
    """Three reports off the centers of their cells, before, at and after noon."""
    offsets = pd.to_timedelta([-2, 0, 2], unit="h")
    frame = pd.DataFrame({"longitude": [31.0, 91.0, 151.0], "time": pd.Timestamp(NOON) + offsets})
    rows = frame.assign(latitude=22.5, variable="temperature", level_hpa=500.0, error=0.1)
    rows = rows.assign(value=250 + 0.1 * frame["longitude"] + 0.5 * np.array([-2.0, 0.0, 2.0]))
    return rows.assign(**columns)


def innovations(made, around=None):
    seen = made.at(NOON, ramp(), around)
    return (seen.values[0] - ramp())[seen.mask[0]]


def test_the_operator_that_interpolates_is_a_switch():
    """Exact reports off the grid: the nearest cell is off by the slope, interpolation is not."""
    exact = soundings(time=pd.Timestamp(NOON), value=250 + 0.1 * soundings()["longitude"])
    assert_close(innovations(reports(exact)), torch.full((3,), 0.1), rtol=0, atol=1e-4)
    interpolating = reports(exact, observation_operator="interpolation")
    assert_close(innovations(interpolating), torch.zeros(3), rtol=0, atol=1e-4)


def test_reports_are_compared_at_their_own_time():
    frames = BackgroundFrames(torch.stack([ramp(h) for h in (-3, 0, 3)]), (-3.0, 0.0, 3.0))
    made = reports(soundings(), observation_operator="interpolation")
    assert_close(innovations(made), torch.tensor([-1.0, 0.0, 1.0]), rtol=0, atol=1e-4)
    timely = reports(soundings(), observation_operator="interpolation_in_time")
    assert_close(innovations(timely, frames), torch.zeros(3), rtol=0, atol=1e-4)


def test_backgrounds_of_other_times_are_found_around_each(refused):
    times = NOON + np.array([-6, 0, 6, 36]) * np.timedelta64(1, "h")
    states = torch.stack([ramp(h) for h in (-6, 0, 6, 36)])
    made = reports(soundings(), observation_operator="interpolation_in_time")
    analyses = made.analyze(InverseDistance(COARSE), states[:3], times[:3])
    assert_close(analyses.states, states[:3], rtol=0, atol=1e-4)
    untimely = reports(soundings(), observation_operator="interpolation")
    moved = untimely.analyze(InverseDistance(COARSE), states[:3], times[:3]).states
    assert (moved - states[:3]).abs().max() > 0.5
    refused(
        r"no other background lies within 12 h of 2020-01-03T00",
        made.analyze,
        InverseDistance(COARSE),
        states,
        times,
    )


def test_in_a_cycle_the_model_fills_the_window():
    """Truth warms by .5 K/h and so does the model: no report at its own time moves anything."""

    def model(states, hours):
        return states + 0.5 * hours

    times = NOON + np.array([0, 6]) * np.timedelta64(1, "h")
    late = soundings(time=soundings()["time"] + pd.Timedelta("6h"), value=soundings()["value"] + 3)
    both = pd.concat((soundings(), late))
    found = {}
    for own_time in (True, False):
        made = reports(both, observation_operator="interpolation" + "_in_time" * own_time)
        found[own_time] = made.cycle(InverseDistance(COARSE), model, ramp(), times, 6.0).states
    # The first window has no forecast before noon: its frame of noon is the earliest.
    assert (found[True][0] - ramp()).abs().max() > 0.5
    kept = reports(late, observation_operator="interpolation_in_time")
    second = kept.cycle(InverseDistance(COARSE), model, ramp(), times, 6.0).states[1]
    assert_close(second, ramp(6), rtol=0, atol=1e-4)
    assert (found[False][1] - ramp(6)).abs().max() > 0.5


class Steps:
    """A model of two frames, six hours apart, that cannot take less."""

    frames, step_hours = 2, 6.0

    def __init__(self):
        self.given = []

    def __call__(self, states, hours, previous=None):
        assert hours == 6
        self.given.append(previous)
        return states + 3.0


@pytest.mark.parametrize("own_time", [False, True])
def test_a_model_of_two_frames_is_given_the_last_two_analyses(own_time):
    """And a window that ends within its step is filled from both ends of the step."""
    model, times = Steps(), NOON + np.array([0, 6, 12]) * np.timedelta64(1, "h")
    later = [
        soundings(time=soundings()["time"] + pd.Timedelta(6 * n, "h"),
                  value=soundings()["value"] + 3 * n) for n in (1, 2)
    ]  # fmt: skip
    operator = "interpolation_in_time" if own_time else "interpolation"
    made = reports(pd.concat(later), observation_operator=operator)
    found = made.cycle(InverseDistance(COARSE), model, ramp(), times, 6.0).states
    assert torch.equal(found[0], ramp())
    given = [previous for previous in model.given if previous is not None]
    assert any(torch.equal(previous[0], found[0]) for previous in given)
    off = (found[2] - ramp(12)).abs().max()  # the truth warms by .5 K/h and so does the model
    assert off < 1e-3 if own_time else off > 0.1
    if not own_time:
        assert [previous is None for previous in model.given] == [True, False]
