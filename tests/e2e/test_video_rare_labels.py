"""An own log with a rare label and with a column that is known too late, by the draft alone."""

import re

import numpy as np
import polars as pl
import pytest
import yaml

ROWS = 100_000
CONFIG = ("--config", "table", "--config", "draft/table.yaml")


def write_log(path, seed=3):
    """Clicks follow readers and prices, .4 % of the rows have a follow; what is clicked is watched.

    The last column is known as late as the one before, but does not give the click away.
    """
    draw = np.random.default_rng(seed)
    reader, book = draw.integers(0, 300, ROWS), draw.integers(0, 500, ROWS)
    price = draw.uniform(3, 600, ROWS).round(2)
    taste = draw.normal(0, 1, 300)[reader] + price / 300
    click = draw.random(ROWS) < 1 / (1 + np.exp(1 - taste))
    follow = draw.random(ROWS) < np.clip(0.00314 * np.exp(taste - 1.5), 0, 0.2)
    watched, read = (
        draw.lognormal(0, 1, ROWS) * np.where(click, 9.0, least) for least in (0.6, 1.1)
    )
    columns = {"at": np.arange(ROWS) // 50, "reader": reader, "book": book, "price": price}
    columns |= {"watch_seconds": watched, "read_seconds": read}
    columns |= {"click": click.astype(int), "follow": follow.astype(int)}
    pl.DataFrame(columns).write_parquet(path)
    return float(follow.mean())


@pytest.fixture(scope="module")
def own(gates_in, tmp_path_factory):
    """Commands in a folder with the log, its draft, and a network that was trained by it."""
    gates = gates_in(tmp_path_factory.mktemp("rare"))
    gates.rate = write_log(gates.folder / "log.parquet")
    words = ("--table.labels", "{click: look, follow: act}", "--table.user", "reader")
    words += ("--table.item", "book", "--table.time", "at", "--output", "draft")
    gates.drafted = gates.succeed("video", "prepare", "log.parquet", *words).out
    parts = ("--data.source.init_args.validation", 0.3, "--data.source.init_args.test", 0.58)
    short = ("--trainer.max_epochs", 1, *parts)
    gates.fitted = gates.succeed("video", "fit", *CONFIG, "--name", "rare", *short).out
    return gates


@pytest.mark.fault("46 R1")
def test_a_rare_label_is_predicted_at_its_rate_by_the_draft_alone(own):
    (line,) = re.findall(r"^HoME, predicted over observed: (.*)$", own.fitted, re.MULTILINE)
    found = {name: float(ratio) for name, ratio in (part.split() for part in line.split(", "))}
    assert (list(found), own.rate) == (["click", "follow"], pytest.approx(0.004, abs=1e-4))
    assert all(0.8 <= ratio <= 1.25 for ratio in found.values()), found
    assert "WARNING" not in own.fitted


@pytest.mark.fault("46 R2")
def test_a_column_that_is_known_too_late_is_left_out_and_told_again_when_put_back(own, tmp_path):
    path = own.folder / "draft" / "table.yaml"
    (line,) = re.findall(r"^- watch_seconds: left out, (.*)$", own.drafted, re.MULTILINE)
    assert re.match(r"it predicts the label 'click' alone, with AUC 0\.9[5-8]\d; if it is", line)
    back = yaml.safe_load(
        re.search(r"put it back: add (\{.*\}) to `dense` of the schema$", line)[1]
    )
    (kept,) = re.findall(r"^- read_seconds: (.*)$", own.drafted, re.MULTILINE)
    assert re.search(r"^dense, .*; AUC 0\.9[34] alone for 'click': is it known before\?$", kept)
    content = yaml.safe_load(path.read_text())
    schema = content["data"]["source"]["init_args"]["schema"]
    assert [one["name"] for one in schema["dense"]] == ["price", "read_seconds"]
    assert "alone predicts" not in own.fitted
    schema["dense"].append(back)
    pl.read_parquet(own.folder / "log.parquet")[:2000].write_parquet(tmp_path / "few.parquet")
    content["data"]["source"]["init_args"]["path"] = str(tmp_path / "few.parquet")
    (tmp_path / "back.yaml").write_text(yaml.safe_dump(content))
    short = ("--trainer.max_steps", 2, "--trainer.limit_val_batches", 1, "--name", "back")
    config = ("--config", "table", "--config", tmp_path / "back.yaml")
    said = own.succeed("video", "fit", *config, *short).out
    assert re.search(
        r"^column 'watch_seconds' alone predicts 'click' with AUC 0\.9[5-8]", said, re.M
    )
