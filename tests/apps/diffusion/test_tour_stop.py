"""The diffusion stop of the tour, on a world of random weights, and where weights are missing."""

import re

import numpy as np
import pytest

from apps.diffusion import tour as module
from apps.diffusion.generate import TRUE
from apps.diffusion.studio import Shipped
from apps.diffusion.tour import ALL, GATE, NEEDED, Drawn, rows_of, tour
from apps.main import App, main
from diffusion.data.concepts import held_out_pairs
from diffusion.fusion.pipeline import Used
from harness.report.page import Page, StopSkippedError


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 2)
    monkeypatch.setattr(module, "STEPS", 1)


def test_the_stop_shows_prompts_adapters_and_images(zoo_root, write, few, monkeypatch, capsys):
    said = []
    monkeypatch.setattr("harness.runs.terminal.SHORT", 0.01)
    monkeypatch.setattr(module, "SHORT", 0.01)
    stop = tour(zoo_root, said.append, world=write.world_of(zoo_root))
    opened, images = stop.rows
    assert re.fullmatch(r"[0-4] of 4", opened.value)
    assert opened.metric == "needed adapters opened, of 6 found of 40"
    assert float(images.value) > 0
    assert images.baseline.startswith("sum of the 6 0.")
    page = Page("Tour").section(stop.title)
    stop.draw(page)
    assert page.html().count("<figure>") == 2
    assert any("2 prompts" in text for text in said)
    lines = re.findall(r"making images: (.+)  (\d of 2)  \d+ s\n", capsys.readouterr().out)
    first, second = dict.fromkeys(lines)
    assert first == ("fish + dotted", "1 of 2")
    assert second[1] == "2 of 2"


def made(gated, plain):
    pairs = held_out_pairs()[: len(gated)]
    images = {
        name: np.stack([np.full((4, 4, 3), value, np.uint8) for value in values])
        for name, values in ((TRUE, [0] * 4), (GATE, gated), (ALL, plain), (NEEDED, plain))
    }
    names = [(*pair.adapters, "none of them") for pair in pairs]
    used = [tuple(map(Used, own, [1.0] * 3, [0.3] * 3, [None] * 3, [0.9, 0.4, 0.6]))
            for own in names]  # fmt: skip
    return Drawn(pairs, ["a"] * len(pairs), images, used)


@pytest.mark.parametrize(
    ("gated", "plain", "word"),
    [
        ([51] * 4, [102] * 4, "closer"),
        ([102] * 4, [51] * 4, "farther"),
        ([51, 102, 51, 102], [102, 51, 102, 51], "not distinguishable"),
    ],
)
def test_verdicts_follow_the_figures(gated, plain, word):
    opened, images = rows_of(made(gated, plain), 40)
    assert (opened.value, opened.baseline) == ("4 of 8", "8 of 8 are found")
    assert opened.verdict == "of 4 useless ones 4 opened"
    assert images.verdict.startswith(word)


def test_missing_weights_are_a_reason_not_a_training(
    zoo_root, write, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(module, "shipped", lambda world: Shipped(None, {}, None, {}))
    with pytest.raises(
        StopSkippedError, match=r"are missing \(base, adapters, encoder, relevance gate"
    ):
        tour(tmp_path / "a", print, world=write.world_of(zoo_root))
    monkeypatch.setattr(module, "World", lambda folder, quick: write.world_of(zoo_root))
    table = {
        "tour": App("apps.tour", "x"),
        "diffusion": App("", "x", stop="apps.diffusion.tour:tour"),
    }
    assert main(["tour", "--root", str(tmp_path)], table) == 1
    assert "skipped: diffusion: weights are missing" in capsys.readouterr().out
    assert not (tmp_path / "tour" / "report.html").exists()
