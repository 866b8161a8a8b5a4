import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endoscopy.data.frame_table import look_like_centimeters, parse_size


@pytest.mark.parametrize(
    ("text", "mm", "censored"),
    [
        ("6mm", 6.0, False),
        ("15mm-", 15.0, True),
        ("15 mm -", 15.0, True),
        ("≥15", 15.0, True),
        (">= 15mm", 15.0, True),
        ("20+", 20.0, True),
        (" 4.5 MM ", 4.5, False),
        ("4,5", 4.5, False),
        ("1.2 cm", 12.0, False),
        (7, 7.0, False),
        (2.25, 2.25, False),
    ],
)
def test_sizes_as_data_sets_write_them(text, mm, censored):
    size = parse_size(text)
    assert (size.mm, size.censored, size.fault) == (pytest.approx(mm), censored, "")


@pytest.mark.parametrize("value", [None, "", "NaN", math.nan, " n/a", "-", "None", "unknown"])
def test_a_missing_size_is_no_size(value):
    size = parse_size(value)
    assert math.isnan(size.mm)
    assert size.fault == "size is missing"


@pytest.mark.parametrize("value", ["large", "3-5mm", "6mm8", "- x", "1e1", "inf", "mm", "5 5"])
def test_what_is_no_size_is_refused(value):
    assert parse_size(value).fault == "size cannot be read"


@pytest.mark.fault("endoscopy D21")
@pytest.mark.parametrize("value", ["0", "0mm", 201, "99cm", -3, "-3mm", "-4"])
def test_impossible_sizes_are_refused(value):
    assert "not between 0 and 200 mm" in parse_size(value).fault


@given(st.floats(0.01, 200, allow_nan=False).map(lambda v: round(v, 3)), st.booleans())
def test_any_size_survives_its_text(mm, censored):
    size = parse_size(f"{mm}mm{'-' if censored else ''}")
    assert (size.mm, size.censored, size.fault) == (mm, censored, "")


@pytest.mark.fault("endoscopy D21")
@pytest.mark.parametrize(
    ("sizes", "centimeters"),
    [
        ([0.3, 0.5, 0.6, 1.0, 2.0, 4.5], True),
        ([2.0, 3.0, 4.0, 6.0, 12.0], False),
        ([1.0, 1.0, 1.5, 2.0, 7.0], False),
        ([0.4, 0.6], False),
        ([2.0, 2.5, 3.0, 3.0, 4.0], False),
    ],
)
def test_sizes_in_centimeters_are_known_by_their_looks(sizes, centimeters):
    assert look_like_centimeters(sizes) == centimeters
