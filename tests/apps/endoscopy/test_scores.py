import json
import math

import pytest
from apps.endoscopy.scores import read_headline, write_headline, write_part

from core_gates.errors import GatesError
from harness.evidence.rows import Bar, Row


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


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_a_damaged_headline_is_one_line(tmp_path, content):
    (tmp_path / "headline.json").write_text(content)
    with pytest.raises(GatesError, match="is damaged: run `gates endoscopy evaluate` again"):
        read_headline(tmp_path)
