"""The language stop of the tour, with a small decoder, and where no weights ship."""

import csv
import re

import numpy as np
import pytest

from apps.language import tour as module
from apps.language.offload import expert_tour
from apps.language.seqboat import digit_tour
from apps.language.tour import drawn, tour
from apps.main import App, main
from harness.figures.style import drawn_numbers
from harness.report.page import Page, StopSkippedError
from language.corpus import Document, read_corpus
from language.counts import ByteCounts
from language.seqboat.speech import recording


def test_the_stop_completes_a_function(trained, weights, tmp_path, monkeypatch):
    lines = "".join(f"    x = a + {n}\n" for n in range(9))
    for number in range(40):
        (tmp_path / f"f{number}.py").write_text(f"def f{number}(a):\n{lines}    return x\n\n\n")
    monkeypatch.setattr(module, "LINES", 1)  # the decoder reads 16 tokens
    monkeypatch.setattr(module, "ADDED", 30)
    said = []
    stop = tour(tmp_path, said.append, weights=weights, corpus=[str(tmp_path)])
    (row,) = stop.rows
    assert row.baseline.startswith("counts of order 5 0.")
    assert float(row.value.split()[0]) > float(row.baseline.split()[-1])
    assert row.verdict == "worse than counts"
    page = Page("Tour").section(stop.title)
    stop.draw(page)
    html = page.html()
    lines = html.count("    x = a + ")
    assert lines > 9  # those of the file, and what counts add
    assert any("counting" in text for text in said)
    assert [one.task for one in stop.done] == ["complete a function"]


def test_counts_add_what_followed():
    counts = ByteCounts.fit([Document("a", "the cat sat. " * 200)])
    assert drawn(counts, "the c", 7) == "at sat."
    coin = ByteCounts.fit([Document("a", "ab" * 1000 + "a" * 2000)], 0)
    assert drawn(coin, "b", 400).count("b") == pytest.approx(100, abs=30)


def test_experts_of_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_tour, "FILES", 2)
    monkeypatch.setattr(expert_tour, "TOKENS", 64)
    part = expert_tour.expert_part(read_corpus(["python"]).part("test")[:20], tmp_path)
    assert 4 * part.memory[0] == part.memory[1]
    cells = [row[-1] for row in drawn_numbers(part.figure) if row[1] == "cell"]
    used = [one for one in cells if one == one]
    length = len(cells) // 96
    assert len(used) == 6 * 2 * length  # two experts of each layer for a byte
    assert {0.0, 1.0, 2.0} == {*used}
    page = Page("Tour").section("experts")
    part.draw(page)
    assert "1.18 MB of its experts are in memory, 4.72 MB on disk" in page.html()


def test_tokens_of_a_spoken_digit(tmp_path, monkeypatch):
    monkeypatch.setenv("GATES_SHARED", str(tmp_path))
    file = tmp_path / "data/audio/fsdd_pcm16_8k.delta.xz"
    done, drawings = digit_tour.digit_part()
    assert done.result == f"not shown: the Free Spoken Digit Dataset is missing, {file}"
    assert not drawings
    file.parent.mkdir(parents=True)
    file.touch()
    noise = recording("3_lucas_2.wav", np.random.default_rng(0).integers(-3000, 3000, 4000))
    monkeypatch.setattr(digit_tour, "read_packed", lambda _: [noise])
    done, (add,) = digit_tour.digit_part()
    add(page := Page("Tour"))
    page.write(tmp_path / "page.html")
    rows = list(csv.DictReader((tmp_path / "figures/spoken-digit.csv").read_text().splitlines()))
    cells = [(float(one["y"]), one["value"] == "1.0") for one in rows if one["series"] == "set 1"]
    parts = [f"{np.mean([on for y, on in cells if y == layer]):.0%}" for layer in range(4)]
    assert len(cells) == 4 * (4000 // 64)  # layers, tokens
    said = f"tokens that attend, by layer: {' '.join(parts)}"
    assert re.fullmatch(rf"hears a \d, probability (0\.\d\d|1\.00); {said}", done.result)


def test_missing_weights_are_a_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "shipped", lambda: tmp_path)
    with pytest.raises(StopSkippedError, match=r"no weights ship: `gates language fit"):
        tour(tmp_path, print)
    table = {
        "tour": App("apps.tour", "x"),
        "language": App("", "x", stop="apps.language.tour:tour"),
    }
    assert main(["tour", "--root", str(tmp_path)], table) == 1
    assert "skipped: language: no weights ship" in " ".join(capsys.readouterr().out.split())
