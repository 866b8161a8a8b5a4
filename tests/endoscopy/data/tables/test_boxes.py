import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endoscopy.data.frame_table import repair_boxes

FRAME = [[100.0, 80.0]]
corner = st.floats(-300, 300, allow_nan=False)


def repair(*box, annotated=FRAME, actual=FRAME):
    return repair_boxes(np.array([box]), np.array(annotated), np.array(actual))


def test_a_good_box_is_left_alone():
    repaired = repair(10, 20, 30, 50)
    assert repaired.boxes.tolist() == [[10, 20, 30, 50]]
    assert not any(flags.any() for flags in repaired[1:])


def test_swapped_corners_come_into_order():
    repaired = repair(20, 10, 50, 30)
    assert repaired.boxes.tolist() == [[10, 20, 30, 50]]
    assert repaired.swapped.tolist() == [True]


def test_a_box_is_clipped_at_every_side():
    repaired = repair(-5, 120, -1, 81)
    assert repaired.boxes.tolist() == [[0, 100, 0, 80]]
    assert repaired.clipped.tolist() == [True]
    assert not repaired.small.any()


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
    assert repair(*box).small.tolist() == [small]


def test_a_box_is_rescaled_to_the_image_before_it_is_clipped():
    repaired = repair(100, 200, 60, 160, annotated=[[200.0, 160.0]], actual=FRAME)
    assert repaired.boxes.tolist() == [[50, 100, 30, 80]]
    assert repaired.rescaled.tolist() == [True]
    assert not repaired.clipped.any()


@pytest.mark.parametrize("annotated", [[[np.nan, np.nan]], [[0.0, 0.0]]])
def test_an_annotation_without_a_size_is_taken_as_pixels(annotated):
    repaired = repair(10, 20, 30, 50, annotated=annotated)
    assert repaired.boxes.tolist() == [[10, 20, 30, 50]]
    assert not repaired.rescaled.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_corners_that_are_no_numbers_are_invalid_not_small(bad):
    repaired = repair(10, bad, 30, 50)
    assert repaired.invalid.tolist() == [True]
    assert not repaired.small.any()


@given(st.tuples(corner, corner, corner, corner))
def test_repaired_boxes_are_ordered_inside_and_stable(box):
    repaired = repair(*box)
    xmin, xmax, ymin, ymax = repaired.boxes[0]
    assert 0 <= xmin <= xmax <= 100
    assert 0 <= ymin <= ymax <= 80
    assert repaired.small[0] == ((xmax - xmin) * (ymax - ymin) < 16)
    again = repair(*repaired.boxes[0])
    assert again.boxes.tolist() == repaired.boxes.tolist()
    assert not (again.swapped | again.clipped).any()
