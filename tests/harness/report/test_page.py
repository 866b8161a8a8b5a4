import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from harness.evidence.rows import Bar, Row
from harness.experiment.scores import Scores
from harness.report.page import Page, Tile

VOID = {"meta", "img", "line", "rect", "br", "hr"}


class Checker(HTMLParser):
    """Collects attributes and text, and fails on unbalanced tags."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 3, 2])
    rows = [
        Row("background", "10 %", "rmse", 3.0, 2.5, 3.5, 40),
        Row("oi", "10 %", "rmse", 1.5, 1.0, 2.0, 40),
        Row("free run", "10 %", "bias", float("nan")),
    ]
    bars = [Bar("oi below background", 0.5, "<=", 1.0, "x"), Bar("speed", 2.0, ">=", 5.0, "x")]
    scores = Scores(rows, bars)
    page = Page("A <b> & title", "**lead**")
    page.tiles([Tile("error", "1.5 K", "was 3 K", "good")])
    page.section("Scores").text("One `code` & <script>alert(1)</script>.\n\nTwo.").scores(scores)
    page.section("Maps").figure(figure, 'A "quoted" caption')
    page.section("Settings").table(["name", "value"], [["length", 850.0], ["on", True]], "Chosen")
    return page


@pytest.fixture
def checked(page, tmp_path):
    checker = Checker()
    text = page.write(tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return text, checker


def test_the_page_needs_no_network(checked):
    text, checker = checked
    assert "://" not in text
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    for tag, name, value in checker.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:40])


def test_text_is_escaped(checked):
    text, checker = checked
    assert "A <b> & title" in checker.text
    assert "<script>alert(1)</script>" in checker.text
    assert "&lt;script&gt;" in text
    assert "<code>code</code>" in text
    assert ("img", "alt", 'A "quoted" caption') in checker.attributes


def test_scores_show_bars_and_intervals_on_one_scale(checked):
    text, checker = checked
    assert "1 of 2 bars met" in checker.text
    assert text.count('class="chip met"') == 2  # a bar and the boolean of the table
    assert text.count('class="chip missed"') == 1
    assert "1.000 to 2.000" in checker.text
    whiskers = re.findall(r'class="whisker" x1="([\d.]+)" x2="([\d.]+)"', text)
    assert whiskers == [("60.0", "100.0"), ("0.0", "40.0")]


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="a row has 1 cells, the header 2"):
        Page("x").table(["a", "b"], [["only one"]])


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page, tmp_path, width):
    """Chromium lays the page out; only the inside of a scroll box may be wider than the screen."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    script = (
        "<script>document.title=[document.documentElement.scrollWidth,innerWidth].join(' ');"
        "document.body.dataset.size=document.title</script></body>"
    )
    (tmp_path / "inner.html").write_text(page.html().replace("</body>", script), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(f'<iframe src="inner.html" width="{width}" height="900" id="f"></iframe>')
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    reader = (
        "<script>onload=()=>{document.body.dataset.found="
        "document.getElementById('f').contentDocument.title}</script>"
    )
    outer.write_text(outer.read_text() + reader)
    done = subprocess.run(
        [*command, Path(outer).as_uri()], capture_output=True, text=True, check=False, timeout=120
    )
    found = re.search(r'data-found="(\d+) (\d+)"', done.stdout)
    assert found, done.stdout[:500] + done.stderr[-500:]
    content, window = map(int, found.groups())
    assert window == width
    assert content <= window


def test_differences_have_a_table_and_a_scale_of_their_own():
    rows = [
        Row("oi", "10 %", "rmse", 300.0, 290.0, 310.0, 40),
        Row("adas", "10 %", "rmse", 299.0, 289.0, 309.0, 40),
        Row("adas", "10 %", "rmse", -1.0, -2.0, 0.5, 40, "oi", 0.3),
    ]
    text = Page("P").scores(Scores(rows, [])).html()
    assert text.count("<table>") == 2
    assert "adas − oi" in text
    assert "10 %, paired differences · 95 %" in text
    _, compared = text.split("paired differences")
    assert 'x1="0.0" x2="100.0"' in compared  # the interval fills its own scale
