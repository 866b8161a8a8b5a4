"""The weather stop of the tour, with three of its nine truths."""

import re

import pytest

from apps.weather.tour import METHODS, tour
from harness.report.page import Page


@pytest.fixture(scope="module")
def stop(tmp_path_factory):
    said = []
    found = tour(tmp_path_factory.mktemp("tour"), said.append, truths=3)
    assert said == [f"{name}: 3 analyses" for name in (*METHODS, "adas_increment")]
    return found


def test_the_figures_beat_the_background(stop):
    assert [row.metric for row in stop.rows] == [
        "RMSE of z500 over background",
        "RMSE of t850 over background",
    ]
    for row in stop.rows:
        value, low, high = map(float, re.findall(r"\d\.\d\d", row.value))
        assert low <= value <= high < 1
        oi = float(row.baseline.removeprefix("OI "))
        assert 0.3 < oi < 1
        assert row.good == (value < oi)  # one that loses to OI is no success
        assert row.verdict.startswith("better than the background, ")
        assert float(row.verdict.split()[-3]) == pytest.approx(value / oi, abs=0.03)


def test_maps_and_the_table_are_drawn(stop, tmp_path):
    page = Page("Tour")
    stop.draw(page)
    html = page.write(tmp_path / "page.html").read_text()
    assert html.count("data:image/png;base64,") == 2
    for method in ("adas_increment", "oi"):
        assert f"{method}, member 9 is the truth" in html
    assert "RMSE over 3 truths" in html
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in html.split("<tr>")]
    rows = {cells[0]: list(map(float, cells[1:])) for cells in lines if cells}
    assert list(rows) == [*METHODS, "adas_increment"]
    for figure, background in zip(rows["adas_increment"], rows["background"], strict=True):
        assert 0 < figure < background
