import numpy as np
import polars as pl
import pytest

from recsys.transform import FeatureTransform
from video_multitask.feed import LABELS
from video_multitask.sources.simulated import HEAVY_COUNTS, TRUTH, SimulatedFeed

SMALL = {"rows": 6000, "users": 100, "videos": 200, "days": 6, "validation_days": 1, "test_days": 2}


@pytest.fixture(scope="module")
def tables():
    return SimulatedFeed(**SMALL).read()


def test_days_are_split_in_order(tables):
    dates = [part["date"].unique().sort().to_list() for part in tables[2:5]]
    assert [len(one) for one in dates] == [3, 1, 2]
    together = [date for one in dates for date in one]
    assert (together, sum(len(part) for part in tables[2:5])) == (sorted(together), SMALL["rows"])


def test_truth_is_known_and_no_feature(tables):
    columns = [f"{TRUTH}{task}" for task in LABELS]
    assert set(columns) <= set(tables.test.columns)
    assert not set(columns) & {*tables.schema.features, *tables.schema.labels}
    truth = tables.train.select(columns).to_numpy().mean(0)
    found = tables.train.select(list(LABELS.values())).to_numpy().mean(0)
    np.testing.assert_allclose(found[:5], truth[:5], atol=0.03)


def test_features_are_known_before_the_video_is_shown(tables):
    assert not {*LABELS.values(), "play_time_ms"} & set(tables.schema.features)


def test_permuted_labels_keep_their_rates_and_nothing_else(tables):
    permuted = SimulatedFeed(**SMALL, permuted=True).read()
    columns = list(LABELS.values())
    whole = [pl.concat(one[2:5]).select(columns) for one in (tables, permuted)]
    assert whole[0].sum().equals(whole[1].sum())
    assert not whole[0].equals(whole[1])
    truth = pl.concat(permuted[2:5])
    view = truth[f"{TRUTH}effective_view"].to_numpy(), truth["is_click"].to_numpy()
    assert abs(np.corrcoef(*view)[0, 1]) < 0.05


def test_a_planted_leak_is_an_input_that_knows_the_label():
    table = SimulatedFeed(**SMALL, leak="long_view").read().train
    assert np.corrcoef(table["leak"], table["long_view"])[0, 1] > 0.5


@pytest.mark.parametrize(("counts", "most"), [("raw", 20.0), ("normalized", 10.0)])
def test_heavy_counts_come_raw_or_normalized(counts, most):
    tables = SimulatedFeed(**SMALL, heavy_counts=counts).read()
    transform = FeatureTransform(tables.schema).fit(tables.train)
    dense = transform.batch(tables.train).dense
    places = [transform.dense_names.index(name) for name in HEAVY_COUNTS]
    largest = float(dense[:, places].abs().max())
    assert largest > most if counts == "raw" else largest < most


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"days": 3, "validation_days": 1, "test_days": 2}, "leave none of 3 to train on"),
        ({"heavy_counts": "all"}, "choose one of none, raw, normalized"),
        ({"leak": "likes"}, "choose one of effective_view"),
        ({"rows": 0}, "rows must be at least 1"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        SimulatedFeed(**{**SMALL, **options})
