import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from polars.testing import assert_frame_equal

import recsys.data.readers.files
from apps.main import main
from apps.video.score import ShardWriter, score
from core_gates.errors import GatesError
from recsys.model_folder import load_model, save_model
from recsys.table_scorer import read_model


@pytest.fixture
def world(shop, model_folder, tmp_path):
    """A folder of Parquet and CSV files, and ``score`` of it."""
    source = tmp_path / "log"
    (source / "more").mkdir(parents=True)
    shop.rows(300, 1).write_parquet(source / "a.parquet", row_group_size=100)
    shop.rows(50, 2).write_parquet(source / "more" / "b.parquet")
    place = SimpleNamespace(run_folder=SimpleNamespace(path=tmp_path / "run"))

    def run(*sources, **options):
        options = {"model": str(model_folder), "output": str(tmp_path / "out")} | options
        score(place, [str(s) for s in sources or [source]], **options)
        return Path(options["output"])

    return SimpleNamespace(source=source, run=run, tmp=tmp_path, model=read_model(model_folder))


def csv_of(table):
    """The text of a table, lists separated by bars."""
    bars = pl.col("last").list.eval(pl.element().cast(pl.String)).list.join("|")
    return table.with_columns(bars).write_csv()


def state(folder):
    files = (path for path in folder.rglob("*.parquet") if not path.name.startswith("."))
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_each_file_gets_one_file_with_keys_and_probabilities(shop, world):
    out = world.run(fused={"buy": 1.5}, offsets={"buy": 0.5})
    for name in ("a", "more/b"):
        table = pl.read_parquet(world.source / f"{name}.parquet")
        found = pl.read_parquet(out / f"{name}.parquet")
        expected = world.model.scorer.score(table).probabilities
        keys = ["reader", "book", "day"]
        assert found.columns == [*keys, "p_view", "p_buy", "p_return", "score"]
        assert_frame_equal(found[:, :3], table.select("reader", "book", "day"))
        np.testing.assert_allclose(found[:, 3:6].to_numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(found["score"], (0.5 + expected[:, 1]) ** 1.5, rtol=1e-5)
    assert json.loads((out / "record.json").read_text()) == {
        "model": world.model.version,
        "options": {
            "key_columns": [],
            "tasks": list(shop.TASKS),
            "fused": {"exponents": {"buy": 1.5}, "offsets": {"buy": 0.5}},
        },
    }
    assert not list(out.rglob(".*"))


def test_a_named_model_names_the_run(shop, model_folder, tmp_path, monkeypatch, capsys):
    """Not the configuration, where none is named."""
    monkeypatch.chdir(tmp_path)
    shop.rows(20, 1).write_parquet("visits.parquet")
    shutil.copytree(model_folder, "bookshop")
    shutil.copytree(model_folder, "runs/video/own/model")
    for words, run in (
        (("--model", "bookshop"), "bookshop"),
        (("--model", "runs/video/own/model"), "own"),
        (("--model", "bookshop", "--config", "unit"), "unit"),
        (("--model", "bookshop", "--name", "mine"), "mine"),
    ):
        assert main(["video", "score", "visits.parquet", *words]) == 0
        assert capsys.readouterr().out.endswith(f"\nruns/video/{run}/predictions\n")
        assert Path(f"runs/video/{run}/predictions/visits.parquet").is_file()
    assert not Path("runs/video/tiny").exists()


def test_a_model_without_finite_probabilities_is_refused(shop, world, refuses):
    loaded = load_model(shop.write_model(world.tmp / "bad"))
    with torch.no_grad():
        for weight in loaded.ranker.net.parameters():
            weight.mul_(1e30)
    save_model(world.tmp / "bad", loaded.ranker, loaded.transform)
    refuses(
        GatesError,
        ("gives a probability that is not finite", lambda: world.run(model=str(world.tmp / "bad"))),
        ("the fused score can exceed", lambda: world.run(fused={"buy": 1e5}, offsets={"buy": 9.0})),
    )
    assert not list(world.tmp.glob("out/**/*.parquet"))


@pytest.mark.parametrize(
    ("rate", "before", "warns"),
    [
        (0.3, 0.3, True),
        (0.1, 0.1, False),
        (0.1, 0.01, True),
        (0.03, 0.0, False),
        (0.1, None, False),
    ],
)
def test_unseen_values_are_a_warning_where_they_are_many_or_far_above_validation(
    world, rate, before, warns
):
    (name, *_) = names = world.model.scorer.sparse_names
    writer = ShardWriter(world.model, [0], None, {} if before is None else {name: before})
    writer.rows, writer.unknown = 1000, np.array([1000 * rate] + [0] * (len(names) - 1), int)
    *_, line = writer.doubts()  # after those of numbers, of which it has none
    assert line.startswith("WARNING: ") == warns
    told = f"{name}: {1000 * rate:.0f} of 1,000 rows ({rate:.1%}) hold values that training has not"
    assert told in line
    assert (before is None) == ("validated" not in line)


@pytest.mark.fault("46 R4")
def test_a_column_in_another_unit_is_told(shop, world, capsys):
    """Age in another unit; then a few rows below those of training; then as in training."""
    low, _, middle, _, high = world.model.scorer.transform.fitted.ranges["age"]
    table = shop.rows(200, 4).with_columns(age=pl.lit(middle * 1000.0))
    table.write_parquet(world.tmp / "days.parquet")
    world.run(world.tmp / "days.parquet")
    said = capsys.readouterr().out
    assert f"WARNING: age: 100.0% of the rows above the training maximum {high:g}, median " in said
    assert ", median 1,000 times\n" in said
    some = pl.when(pl.int_range(pl.len()) < 4).then(pl.lit(low - 1)).otherwise(middle)
    table.with_columns(age=some).write_parquet(world.tmp / "few.parquet")
    world.run(world.tmp / "few.parquet", output=str(world.tmp / "few"))
    said = capsys.readouterr().out
    assert f"\nage: 2.0% of the rows below the training minimum {low:g}\n" in f"\n{said}"
    table.with_columns(age=middle).write_parquet(world.tmp / "same.parquet")
    world.run(world.tmp / "same.parquet", output=str(world.tmp / "same"))
    assert "age:" not in capsys.readouterr().out
    for name, value in (("none", None), ("endless", float("inf"))):
        table.with_columns(age=pl.lit(value, pl.Float64)).write_parquet(
            world.tmp / f"{name}.parquet"
        )
        world.run(world.tmp / f"{name}.parquet", output=str(world.tmp / name))
        assert "WARNING: age: no row holds a number\n" in capsys.readouterr().out


@pytest.mark.fault("46 R4")
@pytest.mark.parametrize("name", ["city", "author", "hour", "last"])
def test_a_column_that_is_wholly_missing_is_told(name, shop, world, capsys):
    """One line for each column, and none for its crosses or where a single value is left."""
    table = shop.rows(200, 4).with_columns(pl.lit(None).alias(name))
    table.write_parquet(world.tmp / "none.parquet")
    world.run(world.tmp / "none.parquet")
    told = [line for line in capsys.readouterr().out.splitlines() if "no row holds" in line]
    assert told == [f"WARNING: {name}: no row holds a value"]
    one = pl.concat([table, shop.rows(300, 4).drop_nulls(name)[:1]], how="vertical_relaxed")
    one.write_parquet(world.tmp / "one.parquet")
    world.run(world.tmp / "one.parquet", output=str(world.tmp / "one"))
    assert "no row holds" not in capsys.readouterr().out


def test_names_that_collide_are_refused(shop, world):
    taken = shop.rows(5).with_columns(p_buy=pl.lit(3), score=pl.lit(1))
    taken.write_parquet(world.tmp / "t.parquet")
    for options, words in (
        ({"tasks": ("buy", "view", "buy")}, "--tasks names 'buy' twice: name it once"),
        ({"key_columns": ("city", "city")}, "--key_columns names 'city' twice: name it once"),
        ({"key_columns": ("p_buy",)}, "the column 'p_buy' has the name of a prediction"),
        ({"key_columns": ("score",), "fused": {"buy": 1.0}}, "'score' has the name of a pred"),
    ):
        with pytest.raises(GatesError, match=words):
            world.run(world.tmp / "t.parquet", **options)
    out = world.run(world.tmp / "t.parquet", key_columns=("p_buy", "score"), tasks=("view",))
    assert pl.read_parquet(out / "t.parquet")[:, :2].equals(taken[["p_buy", "score"]])


def test_keys_have_one_type_in_files_of_all_kinds(shop, world):
    table = shop.rows(40, 5)
    (world.tmp / "c.csv").write_text(csv_of(table))
    table.with_columns(pl.col("day").cast(pl.Int8)).write_parquet(world.tmp / "p.parquet")
    text = table.with_columns(pl.col("reader", "book").cast(pl.String))
    text.write_parquet(world.tmp / "t.parquet")
    floats = table.with_columns(pl.col("reader", "day").cast(pl.Float64))
    floats.write_parquet(world.tmp / "f.parquet")
    out = world.run(*sorted(world.tmp.glob("*.*")))
    for name in "cptf":
        keys = pl.read_parquet(out / f"{name}.parquet").select("reader", "book", "day")
        assert_frame_equal(keys, table.select(keys.columns))


def test_a_second_call_makes_only_what_is_missing(shop, world, capsys):
    out = world.run()
    before = state(out)
    (out / "more" / "b.parquet").unlink()
    shop.rows(10, 9).write_parquet(world.source / "c.parquet")
    world.run()
    after = state(out)
    assert after[out / "a.parquet"] == before[out / "a.parquet"]
    assert set(after) == {out / "a.parquet", out / "more" / "b.parquet", out / "c.parquet"}
    assert "1 of 3 files are complete already" in capsys.readouterr().out


def test_an_empty_table_gives_an_empty_file_of_the_same_columns(shop, world):
    shop.rows(5).clear().write_parquet(world.source / "none.parquet")
    (world.source / "header.csv").write_text(csv_of(shop.rows(5).clear()))
    out = world.run(tasks=("buy",))
    for name in ("none", "header"):
        found = pl.read_parquet(out / f"{name}.parquet")
        assert (found.columns, len(found)) == (["reader", "book", "day", "p_buy"], 0)
    assert pl.read_parquet(out / "none.parquet").schema == pl.read_parquet(out / "a.parquet").schema


OTHER = {
    "model": lambda w, shop: w.run(model=str(shop.write_model(w.tmp / "m" / "shop", seed=1))),
    "tasks": lambda w, _: w.run(tasks=("view",)),
    "keys": lambda w, _: w.run(key_columns=("city",)),
    "fused": lambda w, _: w.run(fused={"buy": 1.0}),
}


@pytest.mark.parametrize("what", OTHER)
def test_predictions_made_otherwise_are_refused_or_all_replaced(shop, world, what):
    out = world.run()
    before = state(out)
    with pytest.raises(GatesError, match=r"of another (model|options): choose another --output"):
        OTHER[what](world, shop)
    assert state(out) == before
    run = world.run
    world.run = lambda **options: run(**options, overwrite_output=True)
    OTHER[what](world, shop)
    after = state(out)
    assert set(after) == set(before)
    assert all(after[path] != before[path] for path in after)
    with pytest.raises(GatesError, match="of another"):
        run()


def test_other_content_of_a_source_is_refused_or_replaced(shop, world):
    out = world.run()
    before = state(out)
    shop.rows(300, 8).write_parquet(world.source / "a.parquet")
    with pytest.raises(GatesError, match="made from other content of"):
        world.run()
    assert state(out) == before
    world.run(overwrite_output=True)
    after = state(out)
    assert after[out / "a.parquet"] != before[out / "a.parquet"]
    assert after[out / "more" / "b.parquet"] == before[out / "more" / "b.parquet"]


def broken_csv(world, shop, change):
    (world.tmp / "x.csv").write_text(change(csv_of(shop.rows(4, 3))))
    return [world.tmp / "x.csv"]


def broken_parquet(world, shop, change):
    path = world.tmp / "x.parquet"
    shop.rows(400, 3).write_parquet(path)
    path.write_bytes(change(path.read_bytes()))
    return [path]


def other_table(world, shop, change):
    change(shop.rows(4, 3)).write_parquet(world.tmp / "x.parquet")
    return [world.tmp / "x.parquet"]


FAULTS = {
    "nothing": (lambda w, s: [w.tmp / "none"], "does not exist: name a Parquet or CSV file"),
    "another file": (
        lambda w, s: [Path(__file__)], "is no table that can be read, expected .parquet, .pq",
    ),
    "no files": (lambda w, s: [w.tmp / "run"], "does not exist"),
    "one name twice": (
        lambda w, s: [w.source, w.source / "more" / "b.parquet", w.source / "more" / "b.parquet"],
        "have the same name 'b'",
    ),
    "missing column": (
        lambda w, s: other_table(w, s, lambda t: t.rename({"author": "autor"})),
        "x.parquet: the table lacks 'author' (did you mean 'autor'?)",
    ),
    "cut Parquet": (
        lambda w, s: broken_parquet(w, s, lambda b: b[:-9]),
        "x.parquet cannot be read as Parquet",
    ),
    "damaged page": (
        lambda w, s: broken_parquet(w, s, lambda b: b[:40] + bytes(200) + b[240:]),
        "x.parquet cannot be read as Parquet",
    ),
    "empty file": (lambda w, s: broken_csv(w, s, lambda t: ""), "x.csv is empty: a line"),
    "short line": (
        lambda w, s: broken_csv(w, s, lambda t: t + "1,2\n"),
        "x.csv cannot be read as CSV: CSV parse error: Row #6: Expected 12 columns, got 2",
    ),
    "no number": (
        lambda w, s: other_table(w, s, lambda t: t.with_columns(age=pl.Series(["1", "", "x", ""]))),
        "x.parquet, row 2, column 'age': 'x' is no number",
    ),
    "no number in CSV": (
        lambda w, s: broken_csv(w, s, lambda t: t.replace("\n", "\n", 1) + csv_row(s)),
        "x.csv, line 6, column 'age': 'old' is no number",
    ),
    "no lists": (
        lambda w, s: other_table(w, s, lambda t: t.with_columns(last=pl.lit(12))),
        "x.parquet: column 'last' has type Int32, a history needs lists",
    ),
}  # fmt: skip


def csv_row(shop):
    columns = shop.rows(1).columns
    return ",".join("old" if c == "age" else "" if c == "last" else "1" for c in columns) + "\n"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_source_is_one_line_and_leaves_no_predictions(shop, world, fault):
    make, words = FAULTS[fault]
    sources = make(world, shop)
    with pytest.raises(GatesError) as caught:
        world.run(*sources)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    out = world.tmp / "out"
    assert not [path for path in out.rglob("*") if path.is_file() and path.name != "record.json"]


@pytest.mark.fault("video V13")
def test_the_line_of_a_wrong_value_is_that_of_the_file(shop, world, monkeypatch):
    """Fields with line ends and blocks before it do not change it."""
    monkeypatch.setattr(recsys.data.readers.files, "CSV_BLOCK", 2**11)
    table = shop.rows(60, 3).with_columns(pl.lit("two\nlines").alias("city"))
    lines = csv_of(table) + csv_row(shop)
    broken_csv(world, shop, lambda _: lines)
    with pytest.raises(GatesError, match=r"x.csv, line 122, column 'age': 'old' is no number"):
        world.run(world.tmp / "x.csv")


def test_wrong_options_are_refused(world, refuses):
    refuses(
        GatesError,
        ("no task 'like'; it has view, buy, return", lambda: world.run(tasks=("like",))),
        ("has no column 'nope': correct --key_columns", lambda: world.run(key_columns=("nope",))),
        ("--threads must be at least 1", lambda: world.run(threads=0)),
        (
            r"no model at .*nowhere: check the path",
            lambda: world.run(model=str(world.tmp / "nowhere")),
        ),
        ("run `gates video fit` first", lambda: world.run(model=None)),
    )
    (world.tmp / "mine").mkdir()
    (world.tmp / "mine" / "notes.txt").touch()
    with pytest.raises(GatesError, match="exists and is no folder of predictions"):
        world.run(output=str(world.tmp / "mine"))
    out = world.run()
    with pytest.raises(GatesError, match="lies in the output"):
        world.run(out)


SLOW = """
import sys, time
import recsys.data.readers.files
from recsys.table_scorer import TableScorer
recsys.data.readers.files.BLOCK_ROWS = 50
score = TableScorer.score
TableScorer.score = lambda *given: (time.sleep(0.1), score(*given))[1]
from apps.main import main
sys.exit(main())
"""


def test_a_killed_command_continues_with_the_same_bytes(shop, world, model_folder, monkeypatch):
    """Four files of five blocks; killed inside the third."""
    monkeypatch.setattr(recsys.data.readers.files, "BLOCK_ROWS", 50)
    source, whole, broken = world.tmp / "many", world.tmp / "whole", world.tmp / "broken"
    source.mkdir()
    for number in range(4):
        shop.rows(250, number).write_parquet(source / f"part{number}.parquet")
    command = [sys.executable, "-c", SLOW, "video", "score", str(source), "--model"]
    command += [str(model_folder), "--output"]
    _kill_inside([*command, str(broken)], broken, complete=2)
    made = state(broken)
    assert len(made) == 2
    for output in (broken, whole):
        world.run(source, output=str(output))
    assert {path: state(broken)[path] for path in made} == made
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) == 5
    assert files == sorted(p.relative_to(broken) for p in broken.rglob("*") if p.is_file())
    assert all((whole / f).read_bytes() == (broken / f).read_bytes() for f in files)
    assert len(pq.read_table(broken / "part3.parquet")) == 250


def _kill_inside(command, output, complete):
    """Kill a command when so many files are complete and another one is being written."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        done = list(output.glob("part*.parquet"))
        under_way = list(output.glob(".part*.partial.parquet"))
        if len(done) == complete and under_way:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had finished before it could be killed"
