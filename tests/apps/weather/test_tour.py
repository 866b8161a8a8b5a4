"""The weather stop of the tour, with three of its nine truths."""

import io
import re

import pytest
from rich.console import Console

from apps.tour import _table
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


def test_nothing_is_cut_at_80_columns(stop):
    out = io.StringIO()
    Console(file=out, width=80).print(_table([stop]))
    assert "…" not in out.getvalue()
    columns = [line.split("│")[1:-1] for line in out.getvalue().splitlines() if "│" in line]
    verdict = " ".join(cells[4].strip() for cells in columns)
    for row in stop.rows:
        assert row.verdict in verdict
