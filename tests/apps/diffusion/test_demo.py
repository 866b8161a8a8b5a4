"""Actions of the page of ``gates diffusion demo``, without a browser: see tests/e2e for one."""

from html.parser import HTMLParser

import numpy as np
import pytest

from apps.diffusion.demo import SIDE, Actions, found_card, header, message_card
from apps.diffusion.studio import Sources, studio

EVIL = "<img src=x onerror=alert(1)><script>alert(1)</script>"
KNOWN = {"div", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "span", "h1", "p"}


class Tags(HTMLParser):
    """Collects the tags and the text of a piece of HTML."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def acting(small_world, write):
    write.adapter(
        small_world / "loras/evil.safetensors", f"snow {EVIL}", 9, **{"modelspec.license": EVIL}
    )
    sources = Sources("loras", "base", "gates.safetensors")
    with studio(sources, lambda: None, lambda *_: None) as found:
        yield Actions(found, 2, None)


def test_a_prompt_gives_a_card_images_and_gates(acting):
    asked, shown = acting.find("a red fox", 2, 3)
    assert asked == ("a red fox", 3, ["fox"])  # no other title has a word of the prompt
    assert shown.gated.shape == shown.plain.shape == (SIDE, SIDE, 3)
    assert not np.array_equal(shown.gated, shown.plain)
    assert len(shown.gates.axes) == 2  # a map and its colors
    assert "words: red, fox" in shown.card


def test_strengths_change_both_images(acting):
    asked, shown = acting.find("a fox in snow", 2, 0)
    assert len(asked.names) == 2
    same = acting.weigh(asked, [1.0] * 5)
    assert same.card == shown.card
    assert np.array_equal(same.gated, shown.gated)
    weak = acting.weigh(asked, [0.2, 1.0, 1.0, 1.0, 1.0])
    assert not np.array_equal(weak.gated, shown.gated)
    assert not np.array_equal(weak.plain, shown.plain)


def test_text_of_files_is_inert(acting):
    asked, shown = acting.find("evil $\\frac", 3, 0)
    assert "evil" in asked.names
    shown.gates.canvas.draw()  # a dollar in a prompt is no formula
    card = Tags(shown.card)
    assert card.tags <= KNOWN
    assert f"snow {EVIL}" in card.text
    for html in (header(acting.studio), message_card(EVIL), found_card([], [EVIL])):
        assert Tags(html).tags <= KNOWN
    assert EVIL in Tags(message_card(EVIL)).text
    assert "4 adapters" in header(acting.studio)


def test_errors_are_messages(acting):
    asked, shown = acting.find(" ", 3, 0)
    assert asked is None
    assert "the prompt is empty" in shown.card
    assert shown.gated is None
    assert "give a prompt" in acting.weigh(None, [1.0]).card
    asked, _ = acting.find("snow", 1, 0)
    assert "must be finite" in acting.weigh(asked, [float("nan")]).card


def test_faulty_calls(small_world, faulty_inputs):
    call = ("diffusion", "demo", "--base", "base", "--library", "loras")
    faulty_inputs({"a port": ((*call, "--port", "70000"), "--port must lie")}, folder=small_world)
