"""The weather stop of the tour, on a short timeline of a young nature."""

import re

import pytest

from apps.weather.tour import METHODS, tour
from harness.report.page import Page


@pytest.fixture(scope="module")
def stop(tmp_path_factory):
    said = []
    found = tour(tmp_path_factory.mktemp("tour"), said.append, cycles=40, spin_up_days=1, members=3)
    assert said[-len(METHODS) :] == [f"40 analyses: {name}" for name in METHODS]
    return found


def test_what_is_done_says_what_it_was_without_reports(stop):
    (done,) = stop.done
    numbers = re.findall(r"\d+\.?\d*", done.result.replace("m² s⁻²", ""))
    own, interpolation, free = map(float, numbers)
    assert max(own, interpolation) < free


def test_verdicts_follow_the_ratio_and_claim_nothing(stop):
    for row, rival in zip(stop.rows, ("oi", "ungated_oi"), strict=True):
        ratio = float(row.value.split()[0])
        words = (
            "as much error as" if ratio == 1 else f"{'less' if ratio < 1 else 'more'} error than"
        )
        assert row.verdict.startswith(f"{words} {rival} here")
        assert row.verdict.endswith("one timeline decides nothing")


def test_errors_over_time_come_first_then_the_map_then_the_table(stop, tmp_path):
    page = Page("Tour")
    stop.draw(page)
    html = page.write(tmp_path / "page.html").read_text()
    places = [html.index(text) for text in ("<figure>", "<p>", "<table>")]
    assert places == sorted(places)
    assert sorted(path.name for path in (tmp_path / "figures").glob("*.png")) == [
        "analysis.png", "cycles.png",
    ]  # fmt: skip
    assert html.index("along one timeline") < html.index("Truth, the forecast")
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in html.split("<tr>")]
    assert [cells[0] for cells in lines if cells] == list(METHODS)
