import hashlib
import json
import math
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from core_gates.errors import GatesError
from harness.evidence.rows import Bar, Row
from harness.experiment.scores import (
    Scores,
    print_scores,
    read_scores,
    write_markdown,
    write_scores,
)
from harness.files import Data

ROOT = Path(__file__).parents[3]


SCHEMA = json.loads((ROOT / "docs/reference/scores.schema.json").read_text())


@pytest.fixture
def written(tmp_path):
    config = tmp_path / "era5.yaml"
    config.write_text("a: 1\n")
    rows = [
        Row(
            "oi",
            "persistence",
            "rmse_z500",
            np.float32(3.5),
            torch.tensor(3.0),
            4.0,
            n=np.int64(40),
        ),
        Row("free run", "persistence", "rmse_z500", math.nan, -math.inf, math.inf),
    ]
    bars = [
        Bar("low enough", 1.0, "<=", 1.0, "m"),
        Bar("not high enough", 1.0, ">=", 1.5),
        Bar("no figure", math.nan, "<=", 1.0),
    ]
    scores = Scores(
        rows, bars, range(3), [Data("era5", "test", 64 * "0", 9)], "A headline.", ["note"]
    )
    path = write_scores(tmp_path / "scores.json", scores, app="weather", config_path=config)
    return path, config


def test_the_file_follows_the_documented_schema(written):
    path, config = written
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    jsonschema.validate(content, SCHEMA)
    assert content["config"] == {
        "name": "era5.yaml",
        "sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
    }
    assert (content["seeds"], content["rows"][0]["n"]) == ([0, 1, 2], 40)
    assert content["rows"][1]["value"] is None
    assert content["rows"][1]["low"] is None
    assert [bar["met"] for bar in content["bars"]] == [True, False, False]
    assert content["bars"][2]["value"] is None
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", content["git"])


def test_the_schema_refuses_what_is_wrong(written):
    content = json.loads(written[0].read_text())
    for wrong in ({"app": 3}, {"seeds": [0.5]}, {"extra": 1}, {"bars": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**content, **wrong}, SCHEMA)


def test_a_wrong_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sense '<=' or '>='"):
        write_scores(
            tmp_path / "s.json", Scores(bars=[Bar("b", 1.0, "<", 2.0)]), app="x", config_path=None
        )
    assert not list(tmp_path.iterdir())


@given(st.floats(), st.floats(allow_nan=False), st.sampled_from(["<=", ">="]))
def test_a_bar_is_met_on_the_right_side_only(value, bar, sense):
    met = Bar("b", value, sense, bar).met
    if math.isnan(value):
        assert not met
    else:
        assert met == (value <= bar if sense == "<=" else value >= bar)


def test_what_was_not_measured_is_said_and_neither_met_nor_missed(tmp_path, capsys):
    told = "seed 3 is not trained: run `gates weather fit --seed_everything 3`"
    rows = [Row("oi", "t", "rmse", 2.0), *(Row("adas", t, "rmse", math.nan, note=told)
            for t in ("t", "u"))]  # fmt: skip
    bars = [Bar("adas over oi", math.nan, "<=", 0.8, note="not measured"), Bar("b", 1.0, "<=", 2.0)]
    path = write_scores(
        tmp_path / "scores.json", Scores(rows, bars, [3]), app="weather", config_path=None
    )
    content = json.loads(path.read_text())
    jsonschema.validate(content, SCHEMA)
    assert [bar["met"] for bar in content["bars"]] == [None, True]
    assert "note" not in content["rows"][0]
    found = read_scores(path, "weather")
    assert [row.note for row in found.rows] == ["", told, told]
    assert [bar.met for bar in found.bars] == [None, True]
    print_scores(path, found, metrics={"other"}, console=Console(width=100))
    out = capsys.readouterr().out
    assert out.count(f"adas: {told}") == 1
    assert "1 of 2 bars met, 1 not measured." in out
    assert "missed" not in out
    text = write_markdown(tmp_path / "scores.md", ["A"], found.rows, found.bars).read_text()
    assert "| adas over oi | – | <= 0.8000 | not measured |" in text
    assert text.count(told) == 1


def test_the_path_is_printed_last(written, capsys):
    path, _ = written
    print_scores(path, read_scores(path, "weather"), console=Console(width=100))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(path)
    text = "\n".join(lines)
    assert "3.500" in text
    assert "[3.000, 4.000]" in text
    assert "met" in text
    assert "missed" in text


def test_scores_are_read_as_they_were_written(written):
    path, _ = written
    found, content = read_scores(path, "weather"), json.loads(path.read_text())
    assert found.rows[0] == Row("oi", "persistence", "rmse_z500", 3.5, 3.0, 4.0, 40)._replace(
        p=found.rows[0].p
    )
    assert math.isnan(found.rows[0].p)
    assert math.isnan(found.rows[1].value)
    assert [bar.met for bar in found.bars] == [bar["met"] for bar in content["bars"]]
    assert (found.seeds, found.data) == ([0, 1, 2], [Data("era5", "test", 64 * "0", 9)])
    assert (found.headline, found.notes, found.quick) == ("A headline.", ["note"], False)
    again = write_scores(path.with_name("again.json"), found, app="weather", config_path=written[1])
    assert json.loads(again.read_text()) == content


def without(part, field):
    return lambda scores: scores[part][0].pop(field) and scores


@pytest.mark.parametrize(
    "damage",
    [
        lambda scores: [],
        lambda scores: {},
        lambda scores: None,
        lambda scores: scores | {"rows": 3},
        lambda scores: scores | {"rows": [3]},
        lambda scores: scores | {"bars": None},
        without("rows", "metric"),
        without("bars", "met"),
        lambda scores: scores | {"rows": [scores["rows"][0] | {"value": "high"}]},
        lambda scores: scores | {"rows": [scores["rows"][0] | {"task": 3}]},
    ],
)
def test_damaged_scores_are_one_line(written, damage):
    path, _ = written
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(GatesError, match=r"is damaged .*: run `gates weather evaluate` again"):
        read_scores(path, "weather")


@pytest.mark.parametrize("content", [b'{"rows": [', b"\xff\xfe{}", b""])
def test_scores_that_are_no_json_are_one_line(tmp_path, content):
    path = tmp_path / "scores.json"
    with pytest.raises(GatesError, match="does not exist: run `gates weather evaluate` first"):
        read_scores(path, "weather")
    path.write_bytes(content)
    with pytest.raises(GatesError, match=r"is damaged .*: run `gates weather evaluate` again"):
        read_scores(path, "weather")
