"""Options that no data can have are one line, before anything is read or written."""

import polars as pl
import pytest

from apps.main import main

SOURCES = "video_multitask.sources"
READERS = "recsys.data.readers"
LOG = f"{SOURCES}.explicit.ExplicitLog", {"path": "l.parquet", "users_path": "u.parquet"}
FEED = f"{SOURCES}.simulated.SimulatedFeed", {}
STREAM = f"{SOURCES}.simulated_stream.SimulatedStream", {"folder": "shards"}
TABLE = f"{READERS}.own_table.OwnTable", {"path": "t.csv", "labels": "[y]"}
RELEASE = f"{SOURCES}.kuairand.KuaiRandTables", {"path": "release"}
SHARDS = f"{SOURCES}.kuairand_stream.KuaiRandStream", {"folder": "shards"}
FILE = {"path": "t.parquet"}
NARROW = "dim must be at least 1, got 0"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The line by which a command refuses its options; nothing may be written."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        before = sorted(tmp_path.rglob("*"))
        assert main(["video", *words]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


@pytest.mark.fault("video V9")
@pytest.mark.parametrize("verb", ["fit", "evaluate"])
@pytest.mark.parametrize(
    ("source", "argument", "value", "line"),
    [
        (FEED, "dim", "0", NARROW),
        (FEED, "users", "1", "users must be at least 2, got 1"),
        (FEED, "videos", "3", "videos must be at least 50, got 3"),
        (FEED, "seed", "-1", "seed must not be negative, got -1"),
        (STREAM, "users", "1", "users must be at least 2, got 1"),
        (STREAM, "dim", "0", NARROW),
        (LOG, "encoder", "foo", "encoder is 'foo'; choose one of mean, target_attention, trans"),
        (LOG, "dim", "0", NARROW),
        (RELEASE, "dim", "0", NARROW),
        (SHARDS, "dim", "0", NARROW),
        (TABLE, "dim", "0", NARROW),
        ((f"{READERS}.census.Census", FILE), "dim", "0", NARROW),
        ((f"{READERS}.movielens.MovieLens", FILE), "dim", "0", NARROW),
        ((f"{READERS}.aliexpress.AliExpress", FILE), "dim", "0", NARROW),
        ((f"{READERS}.open_bandit.OpenBandit", FILE), "dim", "0", NARROW),
    ],
)
def test_arguments_of_a_source(refused, verb, source, argument, value, line):
    kind, given = source
    options = [f"--data.source.init_args.{n}={v}" for n, v in {**given, argument: value}.items()]
    said = refused(verb, "--config", "table", "--data.source.class_path", kind, *options)
    assert said.startswith(f"gates video {verb}: error: ")
    assert line in said


@pytest.mark.fault("video V9")
def test_the_width_of_a_drafted_schema(refused, tmp_path):
    pl.DataFrame({"a": range(50), "y": [0, 1] * 25}).write_csv(tmp_path / "t.csv")
    words = ("--table.labels", "y", "--table.dim", "0", "--output", "out")
    assert f"--table is wrong: {NARROW}" in refused("prepare", "t.csv", *words)


@pytest.mark.fault("video V17")
@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "--output", "out", "--days", "32"),
        ("fit", "--config", "unit", "--data.source.init_args.days", "32"),
    ],
)
def test_a_simulated_log_has_31_days_at_most(refused, words):
    assert "days is 32; choose 31 at most, those of KuaiRand's month" in refused(*words)
