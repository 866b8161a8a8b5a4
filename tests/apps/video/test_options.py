"""Options that no data can have are one line, before anything is read or written."""

import polars as pl
import pytest

from apps.main import main

SOURCES = "video_multitask.sources"
READERS = "recsys.data.readers"
LOG = f"{SOURCES}.explicit.ExplicitLog", {"path": "l.parquet", "users_path": "u.parquet"}
FEED = f"{SOURCES}.simulated.SimulatedFeed", {}
STREAM = f"{SOURCES}.simulated.SimulatedStream", {"folder": "shards"}
TABLE = f"{READERS}.own_table.OwnTable", {"path": "t.csv", "labels": "[y]"}
RELEASE = f"{SOURCES}.kuairand.KuaiRandTables", {"path": "release"}
SHARDS = f"{SOURCES}.kuairand.KuaiRandStream", {"folder": "shards"}
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
        assert (said.err.count("\n"), sorted(tmp_path.rglob("*"))) == (1, before)
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
def test_arguments_of_a_source(refused, tmp_path, verb, source, argument, value, line):
    kind, given = source
    for name in given:
        if name.endswith("path"):
            (tmp_path / given[name]).touch()  # absent, it would be named first
    options = [f"--data.source.init_args.{n}={v}" for n, v in {**given, argument: value}.items()]
    said = refused(verb, "--config", "table", "--data.source.class_path", kind, *options)
    assert said.startswith(f"gates video {verb}: error: ")
    assert line in said


@pytest.mark.fault("video V9")
def test_the_width_of_a_drafted_schema(refused, tmp_path):
    pl.DataFrame({"a": range(50), "y": [0, 1] * 25}).write_csv(tmp_path / "t.csv")
    words = ("--table.labels", "y", "--table.dim", "0", "--output", "out")
    assert f"--table is wrong: {NARROW}" in refused("prepare", "t.csv", *words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--table.labels", "y", "--table.user", "a", "--table.item", "a"), "are named twice: a"),
        (("--table.user", "a"), "--table.user is of a table without labels: name them by"),
    ],
)
def test_columns_of_a_table_that_are_named_wrongly(words, line, refused, tmp_path):
    pl.DataFrame({"a": range(50), "y": [0, 1] * 25}).write_csv(tmp_path / "t.csv")
    assert line in refused("prepare", "t.csv", *words, "--output", "out")


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


FACTORS = "kind: factorization"
CONTESTS = {
    "a box of a number": (f"{{b: {{{FACTORS}, space: 3}}}}", "space of the baseline 'b' is 3, exp"),
    "one end": (
        f"{{b: {{{FACTORS}, space: {{learning_rate: 0.1}}}}}}",
        "space of learning_rate of the baseline 'b' is 0.1, expected two numbers",
    ),
    "words": (
        f"{{b: {{{FACTORS}, space: {{learning_rate: [x, y]}}}}}}",
        "is ['x', 'y'], expected two numbers",
    ),
    "a box of whole numbers": (
        "{b: {kind: trees, space: {max_iter: [10, 20]}}}",
        "space of the baseline 'b' names max_iter, which takes no numbers with fractions",
    ),
    "no trees": ("{b: {kind: trees, max_iter: 0}}", "b: baseline trees: max_iter must be at least"),
    "half a tree": (
        "{b: {kind: trees, max_iter: 2.5}}",
        "max_iter of the baseline trees is 2.5: e",
    ),
    "no passes": (f"{{b: {{{FACTORS}, epochs: 0}}}}", "epochs must be at least 1, got 0"),
    "no bins": ("{b: {kind: one_column, column: duration_ms, bins: 0}}", "bins must be at least 1"),
    "no penalty": ("{b: {kind: biases, penalty: 0}}", "penalty must be positive, got 0"),
    "a word": (f"{{b: {{{FACTORS}, penalty: much}}}}", "is 'much': expected a number"),
}
SMALL = ("--config", "unit", "--data.source.init_args.rows", "600")


@pytest.mark.fault("video V12")
@pytest.mark.parametrize("given", CONTESTS)
def test_baselines_of_a_contest(refused, given):
    value, line = CONTESTS[given]
    assert line in refused("evaluate", *SMALL, "--contest.baselines", value)


@pytest.mark.fault("video V12")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--seeds", "[-1]"), "--seeds names -1: expected 0 to 4,294,967,295"),
        (("--seeds", "[0, 4294967296]"), "--seeds names 4294967296: expected 0 to 4,294,967,295"),
        (("--trainer.max_epochs", "0"), "trainer.max_epochs is 0, which trains nothing"),
        (
            (
                *("--contest.configured_first", "true", "--contest.baselines"),
                f"{{b: {{{FACTORS}, space: {{penalty: [0.1, 1.0]}}}}}}",
            ),
            "the baseline 'b' has a box of penalty and no value to try first: give it penalty",
        ),
        (
            ("--contest.space", "{trainer.max_epochs: [1, 3]}"),
            "contest.space names trainer.max_epo",
        ),
        (
            ("--contest.space", "{data.batch_size: [64, 256]}"),
            "contest.space names data.batch_size",
        ),
    ],
)
def test_seeds_and_spaces_of_a_contest(refused, words, line):
    assert line in refused("evaluate", *SMALL, *words)


@pytest.mark.fault("video V12")
def test_a_training_that_is_never_validated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    steps = ("--trainer.max_epochs", "-1", "--trainer.max_steps")
    contest = ("--contest", "{methods: {}, baselines: {}, space: {}}", "--seeds", "[0]")
    contest += ("--claims", "{beats: [], bounded: false, calibrated: false}")
    words = ("video", "evaluate", *SMALL, *contest, "--data.batch_size", "100", *steps)
    assert main([*words, "1"]) == 2
    said = capsys.readouterr().err
    assert "the training ends before its first validation" in said
    assert (said.count("\n"), main([*words, "20"])) == (1, 0)


@pytest.mark.fault("46 R4")
def test_a_table_that_is_not_there_names_what_drafts_its_configuration(refused):
    said = refused("fit", "--config", "table")
    assert "log.parquet does not exist: name a file or a folder" in said
    assert "gates video prepare TABLE --table.labels LABEL drafts its configuration" in said
    assert said.count("\n") <= 1
    census = ("--data.source.class_path", f"{READERS}.census.Census")
    options = (*census, "--data.source.init_args.path", "none.csv")
    assert "drafts" not in refused("fit", "--config", "table", *options)
