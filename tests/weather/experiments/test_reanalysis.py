"""Problems and scores of a user's store: what is trained on, what belongs together, what fails."""

import copy
import pickle
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from benchmarks.weather.synthetic_store import write_synthetic_store
from core_gates.errors import GatesError
from weather.data.axes import to_dataset, to_tensor
from weather.data.store import open_wb2
from weather.data.training_cache import FrameCache
from weather.data.writing import write_wb2
from weather.experiments.experiment import experiment_of
from weather.experiments.reanalysis import store_data
from weather.experiments.reanalysis.periods import Background, split_times
from weather.experiments.reanalysis.source import ReanalysisSource
from weather.state import Normalizer


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """``own.source(**changes)`` has all its files; ``own.store``, ``own.folder``."""
    folder = tmp_path_factory.mktemp("own")
    store = write_synthetic_store(folder / "own.zarr", frames=120, rows=17, columns=32)

    def source(**changes):
        arguments = {"store": str(store), "background": "12h", "cache": str(folder / "cache")}
        found = ReanalysisSource(**{**arguments, **changes})
        found.prepare()
        return found

    with pytest.MonkeyPatch.context() as patch:  # a climatology of the days that are stored
        patch.setattr(store_data, "WINDOW_DAYS", 21)
        usual = source()
        usual.make_truth()
    return SimpleNamespace(
        source=lambda **changes: source(**changes) if changes else usual,
        store=store, folder=folder, copy=shutil.copytree,
    )  # fmt: skip


HOUR, DAY = np.timedelta64(1, "h"), np.timedelta64(1, "D")


def series(first, last, hours=6):
    start, end = (np.datetime64(text, "s") for text in (first, last))
    return np.arange(start, end, hours * HOUR)


def disjoint(periods, times, gap):
    every = np.concatenate(periods)
    assert len(set(every.tolist())) == len(every)
    for name in ("validation", "held_out"):
        own = getattr(periods, name)
        others = np.setdiff1d(every, own)
        nearest = np.abs(times[own][:, None] - times[others]).min()
        assert nearest >= gap, name


def months(times, positions):
    return sorted({str(month) for month in times[positions].astype("datetime64[M]")})


def test_of_a_year_every_sixth_month_is_held_out():
    times = series("2019-01-01", "2020-01-01")
    found = split_times(times)
    assert months(times, found.held_out) == ["2019-06", "2019-12"]
    assert months(times, found.validation) == ["2019-03", "2019-09"]
    assert len(months(times, found.training)) == 8
    disjoint(found, times, 2 * DAY)
    assert times[found.held_out][0] == np.datetime64("2019-06-03", "s")


def test_of_many_years_the_last_are_kept_back():
    times = series("2016-01-01", "2020-02-15", 24)
    found = split_times(times)
    years = [set(times[p].astype("datetime64[Y]").astype(str).tolist()) for p in found]
    assert years == [{"2016", "2017"}, {"2018"}, {"2019", "2020"}]
    disjoint(found, times, 2 * DAY)


def test_of_a_few_days_sixths_are_dealt():
    times = series("2019-01-01", "2019-01-31")
    found = split_times(times)
    assert [len(p) > 10 for p in found] == [True, True, True]
    disjoint(found, times, 12 * HOUR)  # a tenth of five days


def test_periods_can_be_chosen():
    times = series("2019-01-01", "2020-01-01")
    found = split_times(times, ["2019-05"], ["2019-10-01/2019-11-15", "2019-12-24"], 1.0)
    assert months(times, found.validation) == ["2019-05"]
    assert months(times, found.held_out) == ["2019-10", "2019-11"]  # the eve is all gap
    assert times[found.held_out][-1] <= np.datetime64("2019-11-15T00", "s")
    disjoint(found, times, DAY)
    none = split_times(times, ["2019-05"], ["2019-12-24"], 0.0)
    assert len(none.held_out) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((), ["2019-05"]), "expected periods of both kinds"),
        ((["2019-05"], ["2019-05-20"]), "overlaps one that validates"),
        ((["2019-05"], ["2021"]), "2021 holds no time"),
        ((["2019-05"], ["May"]), "'May' cannot be read: write 2020, 2020-03 or"),
        ((["2019-05"], ["2019-06-01/x"]), "cannot be read"),
        (((), (), -1.0), "a gap of 0 or more"),
        ((["2019"], ["2019-05"]), "overlaps"),
    ],
)
def test_impossible_periods_are_refused(arguments, words, refused):
    refused(words, split_times, series("2019-01-01", "2020-01-01"), *arguments)


def test_too_few_times_are_refused(refused):
    refused(
        r"no time is left for .* among 4 times from 2019-01-01",
        split_times,
        series("2019-01-01", "2019-01-02"),
    )


H = np.timedelta64(1, "h")


@pytest.fixture(scope="module")
def whole(own):
    """The store in memory."""
    with open_wb2(own.store, own.source().channels) as dataset:
        return to_tensor(dataset, own.source().channels)


def test_the_cache_holds_the_store(own, whole):
    source = own.source()
    assert (source.channels.num_channels, source.grid.longitude[0]) == (20, 0)
    assert source.grid.latitude[0] == 90
    assert all(torch.equal(source.truth[number], whole[number]) for number in (0, 60, 119))


def test_statistics_are_those_of_the_training_period(own, whole):
    source = own.source()
    training = source.periods.training
    expected = Normalizer.fit(whole[training].double(), area_weights=source.grid.area_weights())
    torch.testing.assert_close(source.normalizer.mean, expected.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(source.normalizer.std, expected.std, rtol=1e-6, atol=0)
    truths, starts = source.pairs("training")
    errors = whole[truths].double() - whole[starts]
    rms = source.grid.area_mean(errors.square()).mean(0).sqrt()
    torch.testing.assert_close(source.background_sd.double(), rms, rtol=1e-6, atol=0)


def test_backgrounds_are_earlier_states_of_the_same_period(own):
    source = own.source()
    for period in ("training", "validation", "held_out"):
        truths, starts = source.pairs(period)
        assert (source.times[truths] - source.times[starts] == 12 * H).all()
        assert set(starts) <= set(getattr(source.periods, period))
    first = own.source(background="6h", cache=str(own.folder / "six"))
    assert (np.subtract(*first.pairs("training")) == 1).all()


def test_problems_are_functions_of_their_arguments(own):
    source = own.source()
    problems = {key: source.problem(*key) for key in ((0, 0), (0, 1), (1, 0), (5, 3))}
    again = pickle.loads(pickle.dumps(source))
    for key in reversed(problems):
        for found, expected in zip(again.problem(*key), problems[key], strict=True):
            if isinstance(expected, tuple):
                assert torch.equal(found.values, expected.values)
                assert torch.equal(found.errors, expected.errors)
            else:
                assert found is expected or torch.equal(found, expected)
    other = copy.copy(source)
    other.seed = 1
    assert not torch.equal(other.problem(5, 3).truth, problems[5, 3].truth)
    assert bool(problems[0, 0].reset)


def test_problems_have_all_densities_and_errors(own):
    source = own.source()
    observed = [source.problem(step, step % 4).observations for step in range(150)]
    density = torch.stack([one.mask.any(0).float().mean() for one in observed])
    assert 2 <= int((density == 0).sum()) <= 20
    assert density.max() > 0.2
    assert density[density > 0].min() < 0.02
    usual = source.observation_error
    factors = torch.cat([(o.errors / usual[:, None, None])[o.mask] for o in observed])
    assert 0.4 < (factors.sub(1).abs() < 1e-4).float().mean() < 0.6
    assert 0.5 <= factors.min() < 0.6
    assert 9 < factors.max() <= 10.001


def test_a_timeline_draws_from_one_block(own):
    source = own.source(blocks=4)
    truths, _ = source.pairs("training")
    drawn = [{source._places(step, k, False)[0] for step in range(200)} for k in range(5)]
    bounds = [(min(one), max(one)) for one in drawn]
    assert all(a[1] < b[0] for a, b in pairwise(bounds[:4]))
    assert (drawn[4], set().union(*drawn)) == (drawn[0], set(truths.tolist()))


def test_validation_has_its_own_times_and_both_densities(own):
    source = own.source()
    problems = [source.problem(s, k, validation=True) for s in range(3) for k in range(2)]
    states = source.truth
    allowed = {tuple(states[int(p)][0, 3, :4].tolist()) for p in source.periods.validation}
    assert all(tuple(one.truth[0, 3, :4].tolist()) in allowed for one in problems)
    seen = [one.observations.mask.any(0).float().mean() for one in problems]
    assert sum(seen[::2]) > 3 * sum(seen[1::2])


def test_nothing_that_is_tested_was_trained_on(own):
    source = experiment_of(own.source())
    assert not set(source.training_objects()) & set(source.test_objects())
    assert {case.truth for case in source.cases()} <= set(source.periods.held_out.tolist())
    tuning = {case.truth for case in source.cases(tuning=True)}
    assert tuning <= set(source.periods.validation.tolist())
    assert len(source.cases()) <= own.source(max_cases=3).max_cases * 100
    assert len(own.source(max_cases=3).cases()) == 3


def test_a_forecast_store_gives_the_backgrounds(own, whole, refused):
    source = own.source()
    starts = source.times[::4]
    leads = np.asarray([0, 6, 12]) * H
    states = torch.stack([whole[::4] + lead for lead in (1, 2, 3)], 1)
    forecasts = to_dataset(states, source.channels, source.grid, times=starts, leads=leads)
    path = write_wb2(forecasts, own.folder / "forecasts.zarr", overwrite=True)
    found = own.source(background=str(path), cache=str(own.folder / "forecast"))
    truths, places = found.pairs("training")
    assert (truths % 4 == 1).all()  # six hours after each start
    for truth, place in list(zip(truths.tolist(), places.tolist(), strict=True))[::7]:
        torch.testing.assert_close(found.backgrounds[place], whole[truth - 1] + 2)
    assert found.sources[1].role == "background"
    longer = ReanalysisSource(store=str(own.store), background=str(path), lead_hours=12.0)
    assert (longer.pairs("training")[0] % 4 == 2).all()
    refused(
        r"no forecast of 9 h, found 6, 12 h: choose one",
        own.source,
        background=str(path),
        lead_hours=9.0,
    )
    times = found.background_times[[3, 1]]
    at = [int(np.searchsorted(found.times, time)) for time in times]
    torch.testing.assert_close(found.background_states(times), whole[[n - 1 for n in at]] + 2)


def test_a_model_gives_the_backgrounds(own, whole, refused):
    folder = str(own.folder / "model")
    made = {"store": str(own.store), "background": "my.Model", "lead_hours": 6.0, "cache": folder}
    source = ReanalysisSource(**made)
    refused(r"'my.Model' is neither hours such as 24h nor a store", source.prepare)
    source.find_model = {"my.Model": lambda states, hours: states.roll(1, -1) + hours}.__getitem__
    source.prepare()
    truths, places = source.pairs("held_out")
    torch.testing.assert_close(
        source.backgrounds[int(places[2])], whole[truths[2] - 1].roll(1, -1) + 6
    )
    assert (source.times[truths] - source.times[source.cached_times[places]] == 0 * H).all()


def test_two_grids_are_refused(own, whole, refused):
    source = own.source()
    grid = copy.copy(source.grid)
    object.__setattr__(grid, "latitude", grid.latitude * 0.99)
    other = to_dataset(whole[:4], source.channels, grid, times=source.times[:4])
    path = write_wb2(other, own.folder / "shifted.zarr", overwrite=True)
    words = r"shifted.zarr has 17 latitudes .* expected 17 and 32 .*bring both to one grid"
    refused(words, own.source, background=str(path))


def test_what_names_no_background_is_refused(refused):
    assert Background.of("24h", None) == ("earlier", "24h", 24.0)
    assert Background.of("a.zarr", 6.0) == ("store", "a.zarr", 6.0)
    assert Background.of("my_model.py:Drift", None) == ("model", "my_model.py:Drift", 24.0)
    for name, lead in (("24h", 6.0), ("0h", None), ("a.zarr", -1.0), ("a.B", float("nan"))):
        refused("hours once and positive", Background.of, name, lead)


def test_a_store_without_backgrounds_is_refused(own, refused):
    refused(r"no time of training has a background \(7h\).*6 h apart", own.source, background="7h")


def test_an_unsorted_store_is_sorted(own, whole, tmp_path):
    with xr.open_zarr(own.store, chunks=None) as stored:
        order = np.random.default_rng(0).permutation(120)
        stored.isel(time=order).load().to_netcdf(tmp_path / "mixed.nc", engine="h5netcdf")
    mixed = own.source(store=str(tmp_path / "mixed.nc"), cache=str(tmp_path / "cache"))
    assert torch.equal(mixed.truth[77], whole[77])
    assert (mixed.times == own.source().times).all()


def test_caches_of_other_data_are_refused(own, tmp_path, refused):
    for words, changes in (
        (r"made of other data or periods \(periods .*delete it", {"gap_days": 0.0}),
        (r"background 6h instead|hours 12", {"background": "6h"}),
        ("no folder for the training cache", {"cache": None}),
    ):
        refused(words, own.source, **changes)
    own.copy(own.folder / "cache", tmp_path / "cache")
    errors = tmp_path / "cache" / "background_error.json"
    content = errors.read_text()
    errors.write_text(re.sub(r'sd": \[\s*[\d.e+-]+', 'sd": [0.0', content))
    refused(
        "expected positive background errors: delete it", own.source, cache=str(tmp_path / "cache")
    )
    errors.write_text("{")
    refused("delete it, so that", own.source, cache=str(tmp_path / "cache"))
    errors.write_text(content)
    (tmp_path / "cache" / "climatology.zarr" / ".zattrs").unlink()
    refused("is no climatology that was made here", own.source(cache=str(tmp_path / "cache")).check)


def test_observation_errors_are_usual_or_stated(own):
    source = own.source()
    usual = dict(zip(source.channels.labels, source.observation_error.tolist(), strict=True))
    assert (usual["z500"], usual["msl"]) == (82.0, 100.0)
    stated = own.source(error_sd={"geopotential": 5.0})
    assert stated.observation_error[source.channels.index("geopotential", 300)] == 5.0
    with pytest.raises(GatesError, match=r"error_sd .*give positive numbers for 10m_u"):
        _ = own.source(error_sd={"geopotential": -5.0}).observation_error


def test_classical_methods_reduce_the_error_and_rows_count_blocks(own):
    source = own.source()
    scores = source.scores((0.3,), None, (), (), {}, quick=True)
    works = scores.works()
    assert [work.method for work in works] == [
        "background", "inverse_distance", "oi", "climatology",
    ]  # fmt: skip
    for work in works:
        scores.take(work, scores.compute(work))
    rows = {(r.method, r.metric): r for r in scores.rows() if not r.versus}
    assert rows["background", "ratio"].value == 1
    assert rows["oi", "ratio"].value < 0.9
    assert rows["inverse_distance", "ratio"].value != 1
    assert rows["oi", "oa_rms_z500"].value < rows["oi", "ob_rms_z500"].value
    assert ("climatology", "oa_rms_z500") not in rows
    times = source.times[[case.truth for case in scores.cases("0.3")]]
    days = {int((time - times[0]) // (120 * H)) for time in times}
    assert rows["oi", "ratio"].n == len(days)
    bar, networks = scores.bars()
    assert networks.met is None
    assert (bar.name, bar.bar, bar.sense) == ("oi over background, all fields, 0.3", 1.0, "<=")
    assert bar.value == rows["oi", "ratio"].value


def test_climatology_of_a_case_is_that_of_its_day(own, whole):
    source = own.source()
    case = source.cases()[0]
    time = source.times[case.truth]
    day = time.astype("datetime64[D]")
    with xr.open_zarr(own.folder / "cache" / "climatology.zarr", chunks=None) as stored:
        number = 1 + (day - day.astype("datetime64[Y]")).astype(int)
        found = stored["2m_temperature"].sel(hour=(time - day) // H, dayofyear=number)
        expected = torch.from_numpy(found.values)
    assert torch.equal(source.climatology(case)[2], expected)
    assert not FrameCache(own.folder / "cache" / "truth.zarr").normalizer().mean.isnan().any()
