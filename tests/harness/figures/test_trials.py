import pytest

from harness.figures import COLUMNS, Tried, drawn_numbers, trials_figure

TRIED = {
    "a": Tried(
        [
            {"rate": 0.001, "kind": "x", "score": 3.0},
            {"rate": 0.1, "kind": "y", "score": 1.0},
        ],
        {"rate": 0.1, "kind": "y"},
    ),
    "b": Tried(
        [
            {"rate": 0.01, "width": 4, "score": 2.0},
            {"rate": 0.02, "width": 5, "score": None},
        ],
        {"rate": 0.01, "width": 4},
    ),
}


def test_every_trial_is_a_point_and_what_was_chosen_is_ringed():
    figure = trials_figure(TRIED)
    assert [axes.get_xlabel() for axes in figure.axes] == ["rate", "width"]
    assert (figure.axes[0].get_xscale(), figure.axes[1].get_xscale()) == ("log", "linear")
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in drawn_numbers(figure)]
    rates = [row for row in rows if row["panel"] == "rate"]
    points = [(r["series"], r["x"], r["y"]) for r in rates if not r["series"].startswith("set")]
    rings = [(r["x"], r["y"]) for r in rates if r["series"].startswith("set")]
    assert points == [("a", 0.001, 3.0), ("a", 0.1, 1.0), ("b", 0.01, 2.0)]
    assert rings == [(0.1, 1.0), (0.01, 2.0)]


def test_without_a_number_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="no trial has a numeric setting"):
        trials_figure({"a": Tried([{"kind": "x", "score": 1.0}], {"kind": "x"})})
