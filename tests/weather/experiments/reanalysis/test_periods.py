import numpy as np
import pytest

from core_gates.errors import GatesError
from weather.experiments.reanalysis.periods import split_times

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
def test_impossible_periods_are_refused(arguments, words):
    with pytest.raises(GatesError, match=words):
        split_times(series("2019-01-01", "2020-01-01"), *arguments)


def test_too_few_times_are_refused():
    with pytest.raises(GatesError, match=r"no time is left for .* among 4 times from 2019-01-01"):
        split_times(series("2019-01-01", "2019-01-02"))
