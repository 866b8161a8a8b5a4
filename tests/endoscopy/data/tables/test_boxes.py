import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endoscopy.data.tables.boxes import mend_boxes

FRAME = [[100.0, 80.0]]
corner = st.floats(-300, 300, allow_nan=False)


def mend(*box, annotated=FRAME, actual=FRAME):
    return mend_boxes(np.array([box]), np.array(annotated), np.array(actual))


def test_a_good_box_is_left_alone():
    mended = mend(10, 20, 30, 50)
    assert mended.boxes.tolist() == [[10, 20, 30, 50]]
    assert not any(flags.any() for flags in mended[1:])


def test_swapped_corners_come_into_order():
    mended = mend(20, 10, 50, 30)
    assert mended.boxes.tolist() == [[10, 20, 30, 50]]
    assert mended.swapped.tolist() == [True]


def test_a_box_is_clipped_at_every_side():
    mended = mend(-5, 120, -1, 81)
    assert mended.boxes.tolist() == [[0, 100, 0, 80]]
    assert mended.clipped.tolist() == [True]
    assert not mended.small.any()


@pytest.mark.parametrize(
    ("box", "small"),
    [
        ((0, 4, 0, 4), False),
        ((0, 4, 0, 3.99), True),
        ((99, 140, 0, 80), False),
        ((100, 140, 0, 80), True),
        ((97, 140, 0, 5), True),
    ],
)
def test_sixteen_square_pixels_must_be_inside(box, small):
    assert mend(*box).small.tolist() == [small]


def test_a_box_is_rescaled_to_the_image_before_it_is_clipped():
    mended = mend(100, 200, 60, 160, annotated=[[200.0, 160.0]], actual=FRAME)
    assert mended.boxes.tolist() == [[50, 100, 30, 80]]
    assert mended.rescaled.tolist() == [True]
    assert not mended.clipped.any()


@pytest.mark.parametrize("annotated", [[[np.nan, np.nan]], [[0.0, 0.0]]])
def test_an_annotation_without_a_size_is_taken_as_pixels(annotated):
    mended = mend(10, 20, 30, 50, annotated=annotated)
    assert mended.boxes.tolist() == [[10, 20, 30, 50]]
    assert not mended.rescaled.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_corners_that_are_no_numbers_are_invalid_not_small(bad):
    mended = mend(10, bad, 30, 50)
    assert mended.invalid.tolist() == [True]
    assert not mended.small.any()


@given(st.tuples(corner, corner, corner, corner))
def test_mended_boxes_are_ordered_inside_and_stable(box):
    mended = mend(*box)
    xmin, xmax, ymin, ymax = mended.boxes[0]
    assert 0 <= xmin <= xmax <= 100
    assert 0 <= ymin <= ymax <= 80
    assert mended.small[0] == ((xmax - xmin) * (ymax - ymin) < 16)
    again = mend(*mended.boxes[0])
    assert again.boxes.tolist() == mended.boxes.tolist()
    assert not (again.swapped | again.clipped).any()
