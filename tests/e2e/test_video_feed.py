"""A simulated feed from files to scores: simulate, prepare, fit, score, as the page shows."""

import numpy as np
import polars as pl
import pytest

from recsys.table_scorer import read_model
from video_multitask.sources.simulated import SimulatedFeed

WORLD = {"rows": 3000, "users": 60, "videos": 120, "days": 14, "seed": 1}
KEYS = ["user_id", "video_id", "time_ms"]


@pytest.fixture(scope="module")
def prepared(gates_in, tmp_path_factory):
    """Commands in a folder with a feed as files, and prepared."""
    gates = gates_in(tmp_path_factory.mktemp("feed"))
    words = [word for name, value in WORLD.items() for word in (f"--{name}", value)]
    gates.succeed("video", "simulate", *words, "--output", "feed")
    words = ("feed/data", "--split", "none", "--history", 5, "--output", "data/feed")
    said = gates.succeed("video", "prepare", *words).out
    assert "further columns of the log: is_collect, is_download, position, propensity" in said
    return gates


@pytest.mark.slow
def test_a_prepared_feed_is_scored_as_the_same_feed_in_memory(prepared, small_feed):
    small_feed(prepared.folder)
    world = [f"--data.source.init_args.{name}={value}" for name, value in WORLD.items()]
    prepared.video("fit", *world)
    prepared.succeed("video", "score", "data/feed", "--config", "small")
    run = prepared.folder / "runs/video/small"
    found = pl.read_parquet(run / "predictions" / "*.parquet").sort(KEYS)
    tables = SimulatedFeed(**WORLD).read()
    rows = pl.concat([tables.train, tables.validation, tables.test]).sort(KEYS)
    assert found.select(KEYS).to_numpy().tolist() == rows.select(KEYS).to_numpy().tolist()
    expected = read_model(run / "model").scorer.score(rows).probabilities
    names = [name for name in found.columns if name not in KEYS]
    np.testing.assert_allclose(found.select(names).to_numpy(), expected, atol=1e-6)


def test_a_network_is_trained_on_a_prepared_feed(gates_in, tmp_path):
    gates = gates_in(tmp_path)
    words = ("--rows", 1500, "--users", 30, "--videos", 60, "--days", 31, "--output", "feed")
    gates.succeed("video", "simulate", *words)
    words = ("feed/data", "--history", 5, "--output", "data/feed")
    gates.succeed("video", "prepare", *words)
    small = ("--model.options", '{"dim": 4, "hidden_dims": [8], "rank": 2, "tower_dims": [4]}')
    source = "--data.source.init_args"
    gates.video(
        "fit", f"{source}.path", "data/feed", f"{source}.history", 5, "--name", "feed",
        "--data.batch_size", 256, "--trainer.max_epochs", 1, "--trainer.val_check_interval", 1.0,
        *small, config="kuairand_pure",
    )  # fmt: skip
    gates.succeed("video", "score", "data/feed", "--name", "feed")
    found = pl.read_parquet(tmp_path / "runs/video/feed/predictions/*.parquet")
    assert len(found) == 1500
    assert found.select(pl.exclude(KEYS).is_between(0, 1).all()).row(0) == (True,) * 10
