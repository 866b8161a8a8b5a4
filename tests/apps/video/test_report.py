"""What the report draws of one user."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_allclose

from apps.main import main
from apps.video import report
from apps.video.report import day_of_one_user
from recsys.schema import Dense, FeatureSchema, Task
from recsys.transform import FeatureTransform


def test_the_list_holds_each_video_of_one_day_of_one_user_once():
    table = pl.DataFrame(
        {
            "user": [1, 1, 1, 1, 2, 2, 2, 1],
            "video": [7, 8, 7, 9, 7, 8, 9, 5],
            "date": [20, 20, 20, 21, 20, 20, 20, 20],
        }
    )
    schema = SimpleNamespace(user="user", item="video")
    rows, day = day_of_one_user(table[:4], schema)
    assert (rows.tolist(), day) == ([0, 1], "20")
    rows, day = day_of_one_user(table[:7], schema)
    assert (rows.tolist(), day) == ([4, 5, 6], "20")
    rows, day = day_of_one_user(table.drop("date"), schema)
    assert (rows.tolist(), day) == ([0, 1, 3, 7], "the days of the test")


@pytest.mark.fault("video V29")
def test_no_list_where_nobody_is_known():
    table = pl.DataFrame({"user": [None, 1], "video": [7, None]})
    rows, day = day_of_one_user(table, SimpleNamespace(user="user", item="video"))
    assert (rows.tolist(), day) == ([], "")


@pytest.mark.fault("video V31")
def test_calibration_and_fields_weigh_the_rows(monkeypatch):
    """Rows of weight 0, with predictions that are far off, change nothing."""
    drawn, page = {}, SimpleNamespace(section=lambda _: None, figure=lambda *_, **__: None)
    monkeypatch.setattr(report, "reliability_figure", drawn.update)
    monkeypatch.setattr(report, "importance_figure", lambda *_, **__: None)
    monkeypatch.setattr(report, "permutation_importance", lambda *_, **given: drawn.update(given))
    draw = np.random.default_rng(0)
    rows = {"d": draw.normal(size=400), "y": draw.integers(0, 2, 400), "w": np.ones(400)}
    table = pl.DataFrame(rows)
    far = table.with_columns(d=-table["d"] * 30, w=pl.lit(0.0))
    schema = FeatureSchema(tasks=(Task("y"),), dense=(Dense("d", "none"),), weight="w")
    transform, seen = FeatureTransform(schema).fit(table), []
    for part in (table, pl.concat([table, far])):
        data = SimpleNamespace(table=lambda _, part=part: part, transform=transform, schema=schema)
        batch = transform.batch(part)
        found = batch.dense[:, :1].double().sigmoid().numpy()
        report._calibration(page, data, batch, found, "home")
        report._fields(page, data, None)
        seen.append(dict(drawn))
    assert_allclose(seen[1]["y"].observed, seen[0]["y"].observed)
    assert_allclose(seen[1]["y"].counts, seen[0]["y"].counts)
    assert seen[1]["weights"].tolist() == [1.0] * 400 + [0.0] * 400


@pytest.mark.fault("video V11")
def test_a_report_of_unwanted_behavior_alone_has_no_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    rows = {n: draw.integers(0, 20, 600) for n in ("user", "video")}
    rows |= {"day": np.arange(600) // 60, "skip": draw.integers(0, 2, 600)}
    pl.DataFrame(rows).write_parquet("log.parquet")
    given = {"path": "log.parquet", "labels": "[skip]", "user": "user", "item": "video"}
    options = [f"--data.source.init_args.{n}={v}" for n, v in {**given, "time": "day"}.items()]
    net = ["--model.net", "SharedBottom", "--model.options", "{hidden_dims: [4], tower_dims: [4]}"]
    contest = ["--contest", "{methods: {}, baselines: {}, space: {}}", "--trainer.max_epochs", "1"]
    words = ["--config", "table", *options, *net, *contest]
    assert main(["video", "evaluate", *words, "--seeds", "[0]"]) == 0
    assert main(["video", "report", *words]) == 0
    (page,) = tmp_path.rglob("*.html")
    assert "skip speak against an item" in page.read_text()
