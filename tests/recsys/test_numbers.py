"""Numbers of rows, compared with those of the training rows."""

import numpy as np
import polars as pl
import pytest

from recsys.schema import Dense, FeatureSchema, Task
from recsys.transform import FeatureTransform
from recsys.transform.fitting import has_shifted, places_of

SCALINGS = ("log_standardize", "standardize", "buckets", "none")


def fitted(column, scaling="standardize"):
    table = pl.DataFrame({"n": column}, strict=False)
    schema = FeatureSchema((Task("y"),), dense=(Dense("n", scaling=scaling),))
    return FeatureTransform(schema).fit_batches([table[:100], table[100:]])


@pytest.mark.fault("46 R4")
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_transform_knows_ends_and_quartiles_of_its_numbers(scaling, tmp_path):
    column = [*np.random.default_rng(0).permutation(401).tolist(), None, float("nan")]
    made = fitted([-7 if n == 0 else n for n in column], scaling)
    expected = {"n": [-7, 100, 200, 300, 400]}
    assert made.fitted.ranges == expected
    assert FeatureTransform.load(made.save(tmp_path / "t")).fitted.ranges == expected
    assert made.grow(pl.DataFrame({"n": [5000]})).fitted.ranges == expected


@pytest.mark.fault("46 R4")
def test_a_column_without_numbers_has_no_range():
    assert fitted([None, None]).fitted.ranges == {}


@pytest.mark.fault("46 R4")
@pytest.mark.parametrize(
    ("numbers", "counts", "shifted"),
    [
        ([0, 50, 100, np.nan], [3, 0, 0, 0, 0], False),
        ([-1, 101, 201, 500, -101], [5, 2, 3, 1, 2], False),
        ([201.0] * 11 + [50.0] * 9, [20, 0, 11, 0, 11], True),
        ([201.0] * 10 + [50.0] * 10, [20, 0, 10, 0, 10], False),
        ([-200.0] * 12 + [np.nan] * 30 + [50.0] * 8, [20, 12, 0, 12, 0], True),
        ([201.0] * 19, [19, 0, 19, 0, 19], False),  # too few to have a median
        ([200.0] * 40, [40, 0, 40, 0, 0], False),  # three quartile ranges away, not more
    ],
)
def test_numbers_outside_and_far_are_counted_and_most_of_them_shift_the_median(
    numbers, counts, shifted
):
    found = places_of(np.array(numbers, np.float64), [0, 25, 50, 75, 100])
    assert (found.tolist(), has_shifted(found)) == (counts, shifted)
