import json
import math

from apps.endoscopy_scores import read_headline, write_headline, write_markdown, write_part
from apps.scores import Bar, Row


def tasks(path):
    return [row["task"] for row in json.loads(path.read_text())["rows"]]


def write(path, audit, *names, value=0.5):
    rows = [Row("configured", name, "mape", value) for name in names]
    bars = [Bar(f"{name}, bar", value, "<=", 1.0) for name in names]
    write_part(path, audit=audit, config_path=None, seeds=[int(audit)], rows=rows, bars=bars)
    return json.loads(path.read_text())


def test_evaluation_and_audits_replace_only_their_own(tmp_path):
    path = tmp_path / "scores.json"
    write(path, False, "test", "agc")
    write(path, True, "audit: masks", "audit: boxes")
    assert tasks(path) == ["test", "agc", "audit: masks", "audit: boxes"]
    write(path, True, "audit: masks", value=0.25)
    assert sorted(tasks(path)) == ["agc", "audit: boxes", "audit: masks", "test"]
    found = write(path, False, "test")
    assert sorted(tasks(path)) == ["audit: boxes", "audit: masks", "test"]
    masks = [row["value"] for row in found["rows"] if row["task"] == "audit: masks"]
    assert masks == [0.25]
    assert len(found["bars"]) == 3


def test_nan_survives_and_a_damaged_file_is_replaced(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("{")
    write(path, True, "audit: masks", value=math.nan)
    found = write(path, False, "test")
    assert found["rows"][1]["value"] is None
    assert found["bars"][1]["met"] is False


def test_headline_comes_back(tmp_path):
    assert read_headline(tmp_path) == ("", "")
    write_headline(tmp_path, "constant: …", "note")
    assert read_headline(tmp_path) == ("constant: …", "note")


def test_markdown_begins_with_the_headline(tmp_path):
    rows = [
        Row("constant", "test", "mape", 0.6, 0.5, 0.7, 10),
        Row("configured", "test", "mape", 0.1),
        Row("configured", "test", "coverage", 0.9, 0.8, 1.0, 10),
        Row("configured", "test", "hidden", 1.0),
    ]
    other = [Row("configured", "test", "auroc_5mm", 0.75)]
    path = write_markdown(tmp_path / "a.md", "line", "note", rows, {"mape", "coverage"}, other)
    text = path.read_text()
    lines = text.splitlines()
    assert lines[0] == "line"
    assert "| method | mape | coverage |" in lines
    assert "| constant | 0.6000 [0.5000, 0.7000] |  |" in lines
    assert "| configured | 0.1000 | 0.9000 [0.8000, 1.000] |" in lines
    assert "hidden" not in text
    assert lines[lines.index("## test, other scores") + 2] == "| method | auroc_5mm |"
    assert lines[-1] == "| configured | 0.7500 |"
