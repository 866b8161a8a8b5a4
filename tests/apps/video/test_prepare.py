import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import yaml

from apps.main import main
from apps.video import prepare as verb
from apps.video.prepare import Columns
from core_gates import GatesError
from recsys import FeatureSchema, OwnTable
from recsys.infer import plain
from video_multitask import leaks
from video_multitask.history import add_history
from video_multitask.simulator.log import export_kuairand, simulate
from video_multitask.sources.kuairand import KuaiRandStream, KuaiRandTables
from video_multitask.stream.parquet_stream import load_stored
from video_multitask.stream.shards import open_shards


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    feed = simulate(rows=6000, users=80, videos=120, days=31, seed=9)
    return export_kuairand(feed, tmp_path_factory.mktemp("export") / "KuaiRand-Simulated").parent


@pytest.fixture
def prepare(tmp_path):
    """``gates video prepare`` into a folder of the test."""
    place = SimpleNamespace(run_folder=SimpleNamespace(path=tmp_path / "run"))

    def run(*sources, **options):
        verb.prepare(place, [str(s) for s in sources], **options)
        return Path(options.get("output") or tmp_path / "run" / "prepared")

    return run


def test_a_release_becomes_shards_with_what_they_teach(release, prepare, capsys):
    folder = prepare(release, history=3, means=("is_click",))
    shards = open_shards(folder, verify=True)
    assert shards.rows == 6000
    assert {"past_video_id", "past_mean_is_click", "complete", "fans_user_num"} <= set(
        shards.columns
    )
    said = capsys.readouterr().out
    assert "standard: " in said
    assert "random: " in said
    assert "6,000 rows of 31 days" in said
    stream = KuaiRandStream(str(folder), history=3, encoder="transformer", means=("is_click",),
                            dim=4).stream(64, "given", 0, None)  # fmt: skip
    stored = load_stored(stream.parts["train"], stream.schema)
    assert stored.fitted.rows == stream.parts["train"].rows
    assert f"user_id {stored.sizes['user_id']}" in said
    tables = KuaiRandTables(str(folder), history=3, means=("is_click",)).read()
    assert len(tables.train) == stored.fitted.rows


@pytest.mark.fault("video V21")
def test_a_past_that_knows_the_future_is_refused(release, prepare, tmp_path, monkeypatch):
    def leaking(log, length, lists, means):
        known = log.select(pl.col("is_click").mean().over("user_id").alias("past_mean_is_click"))
        return add_history(log, length, lists).hstack(known)

    assert leaks.add_history is add_history
    monkeypatch.setattr(leaks, "add_history", leaking)
    with pytest.raises(GatesError, match=r"past_mean_is_click of rows up to time_ms = .* depends"):
        prepare(release, history=2, means=("is_click",))
    assert not (tmp_path / "run").exists()


def test_further_columns_of_a_log_are_kept(release, prepare, tmp_path, capsys):
    source = tmp_path / "release"
    shutil.copytree(release, source)
    first, second = sorted((source / "data").glob("log_standard*.csv"))
    log = pl.read_csv(first)
    log = log.with_columns(hour=pl.lit(99), tag=pl.lit("x"), past_tab=1, alone=1)
    log.write_csv(first)
    folder = prepare(source, split="none")
    said = capsys.readouterr().out
    assert "further columns of the log: is_collect, is_download, position, propensity\n" in said
    assert "another table has them or a log lacks them: hour, tag, past_tab, alone\n" in said
    found = pl.read_parquet(folder / "*.parquet").sort("time_ms", "user_id", "video_id")
    logs = [pl.read_csv(path) for path in (source / "data").glob("log*.csv")]
    expected = pl.concat([one.select([*found.columns[:19], "position", "propensity"])
                          for one in logs]).sort("time_ms", "user_id", "video_id")  # fmt: skip
    for name in ("position", "propensity"):
        assert found[name].to_list() == expected[name].to_list()
    pl.read_csv(second).with_columns(position=pl.lit("top")).write_csv(second)
    with pytest.raises(GatesError, match=f"{second.name}: column 'position' holds String, but Int"):
        prepare(source, split="none", output=str(tmp_path / "other"))


def test_a_feed_that_ends_before_the_second_period_is_prepared(prepare, tmp_path):
    export_kuairand(simulate(rows=500, users=20, videos=60, days=3, seed=1), tmp_path / "short")
    assert open_shards(prepare(tmp_path / "short", split="none")).rows == 500


def test_an_output_is_only_replaced_if_asked_for(release, prepare):
    folder = prepare(release, split="none")
    assert not list(folder.glob(".*"))
    with pytest.raises(GatesError, match="exists: choose another --output or add --overwrite"):
        prepare(release)
    before = (folder / "manifest.json").read_bytes()
    prepare(release, history=2, overwrite_output=True)
    assert (folder / "manifest.json").read_bytes() != before
    assert len(list(folder.glob(".transforms/*"))) == 1


@pytest.mark.fault("video H1")
def test_an_output_never_replaces_what_it_is_made_from(release, prepare, tmp_path):
    log, own = tmp_path / "own" / "log.parquet", shutil.copytree(release, tmp_path / "release")
    log.parent.mkdir()
    table().write_parquet(log)
    link = tmp_path / "link"
    link.symlink_to(own)
    columns = Columns(("click",))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, output, options in [
        (log, log.parent, {"table": columns}),
        (log.parent, log.parent, {"table": columns}),
        (log, log, {"table": columns}),
        (own, own, {"split": "none"}),
        (own, own / "data", {"split": "none"}),
        (own, link, {"split": "none"}),
        (own / "data", own, {"split": "none"}),
    ]:
        with pytest.raises(GatesError, match=r"the output .*: choose another --output"):
            prepare(source, output=str(output), overwrite_output=True, **options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    prepare(log, output=str(log.parent / "draft"), table=columns)
    assert log.is_file()


@pytest.mark.fault("video H9")
def test_wrong_columns_and_an_output_that_is_a_file_are_refused(prepare, tmp_path, refuses):
    log, file = tmp_path / "log.parquet", tmp_path / "file"
    table().write_parquet(log)
    file.touch()
    refuses(
        GatesError,
        (
            r"--table is wrong: .*click",
            lambda: prepare(log, table=Columns(("click",), time="click")),
        ),
        (
            "is a file and no folder: choose another --output",
            lambda: prepare(
                log, table=Columns(("click",)), output=str(file), overwrite_output=True
            ),
        ),
    )
    assert file.is_file()


@pytest.mark.fault("46 R3")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("download", "pure"),
        ("history", 20),
        ("means", ("click",)),
        ("strict", True),
        ("split", "none"),
        ("drop_invalid", True),
    ],
)
def test_options_of_a_release_are_refused_with_a_table(prepare, tmp_path, name, value):
    log = tmp_path / "log.parquet"
    table().write_parquet(log)
    with pytest.raises(GatesError, match=f"--{name} is for logs in KuaiRand's format"):
        prepare(log, table=Columns(("click",)), **{name: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("video V32")
@pytest.mark.parametrize("kept", ["thesis.tex", "rows.parquet", "data"])
def test_a_folder_with_other_files_is_not_replaced(release, prepare, tmp_path, kept):
    """--overwrite_output replaces an older output, and deletes nothing that is of value."""
    log, other = tmp_path / "log.parquet", tmp_path / "other"
    table().write_parquet(log)
    (other / kept).mkdir(parents=True) if kept == "data" else other.mkdir()
    if kept != "data":
        (other / kept).write_text("ten years of work")
    columns = Columns(("click",))
    for source, options in [(log, {"table": columns}), (release, {"split": "none"})]:
        with pytest.raises(GatesError, match=f"other holds '{kept}', which is no older output"):
            prepare(source, output=str(other), overwrite_output=True, **options)
    line = ("--output", str(other), "--overwrite_output", "--rows", "100", "--root", str(tmp_path))
    assert main(["video", "simulate", *line]) == 2
    assert (other / kept).exists()
    (other / kept).rmdir() if kept == "data" else (other / kept).unlink()
    for _ in range(2):
        prepare(log, output=str(other), overwrite_output=True, table=columns)
    assert sorted(path.name for path in other.iterdir()) == ["report.md", "table.yaml"]


@pytest.mark.fault("video H9")
@pytest.mark.parametrize(
    "words", [("export", "--formats", ""), ("prepare", "x", "--table.labels=")]
)
def test_a_list_without_a_value_is_refused(words, capsys):
    assert main(["video", *words]) == 2
    assert "names nothing: give one value or several" in capsys.readouterr().err


def test_an_archive_is_downloaded_first(release, prepare, tmp_path, monkeypatch):
    asked = []

    def download(name, folder, *, notify):
        asked.append((name, folder))
        shutil.copytree(release, folder)
        return folder

    monkeypatch.setattr(verb, "download_release", download)
    folder = prepare(tmp_path / "archive", download="pure", split="none")
    assert (asked, open_shards(folder).rows) == ([("pure", tmp_path / "archive")], 6000)


def test_a_split_without_rows_and_two_sources_are_refused(release, prepare, tmp_path):
    with pytest.raises(GatesError, match="one folder or table at a time, found 2"):
        prepare(release, release)
    few = simulate(rows=300, users=20, videos=60, days=4, seed=1)
    folder = export_kuairand(few, tmp_path / "few")
    for path in folder.glob("log_*_4_22_*"):
        path.unlink()
    with pytest.raises(GatesError, match=r"has no rows from 20220420 .* give --split none"):
        prepare(folder)
    assert prepare(folder, split="none", overwrite_output=True).is_dir()


def table(number=600, seed=0):
    draw = np.random.default_rng(seed)
    price = draw.gamma(2.0, 9.0, number)
    click = draw.random(number) < 1 / (1 + np.exp(price / 9 - 2))
    return pl.DataFrame(
        {
            "reader": draw.integers(0, 60, number),
            "book": draw.integers(0, 90, number),
            "city": draw.choice(["Graz", "Linz", "NA"], number),
            "price": price,
            "day": np.sort(draw.integers(1, 40, number)),
            "click": click.astype(int),
            "buy": (click & (draw.random(number) < 0.3)).astype(int),
            "basket": click.astype(int) * 3 + 1,
            "hint": click + draw.normal(0, 0.45, number),
        }
    )


def test_a_table_becomes_a_configuration_with_reasons_and_leaks(prepare, tmp_path, capsys):
    table().write_csv(tmp_path / "shop.csv")
    columns = Columns(("click", "buy"), user="reader", item="book", time="day", missing=("NA",))
    folder = prepare(tmp_path / "shop.csv", table=columns)
    source = yaml.safe_load((folder / "table.yaml").read_text())["data"]["source"]
    assert source["class_path"] == "recsys.data.readers.own_table.OwnTable"
    tables = OwnTable(**source["init_args"]).read()
    drafted = OwnTable(str(tmp_path / "shop.csv"), ["click", "buy"], user="reader", item="book",
                       time="day", missing=["NA"]).read()  # fmt: skip
    assert tables.schema == drafted.schema
    assert tables.train.equals(drafted.train, null_equal=True)
    assert tables.test["day"].min() > tables.train["day"].max()
    report = (folder / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert "- basket: left out" in report
    assert "- city: sparse" in report
    assert "column 'hint' alone predicts 'click' with AUC 0.9" in report
    assert f"- click: mean {drafted.train['click'].mean():.4g}" in report
    assert "0 test rows repeat reader, book, day of a training row" in report


@pytest.mark.fault("video V10")
def test_labels_in_words_are_drafted_as_numbers_are(prepare, tmp_path):
    """True and False, as pandas writes them."""
    numbers = table(800)
    truth = pl.when(pl.col("click") == 1).then(pl.lit("True")).otherwise(pl.lit("False"))
    words = numbers.with_columns(click=truth)
    reports = []
    for name, log in (("numbers", numbers), ("words", words)):
        (tmp_path / name).mkdir()
        log.write_parquet(tmp_path / name / "log.parquet")
        columns = Columns(("click",), user="reader", time="day")
        folder = prepare(tmp_path / name / "log.parquet", table=columns,
                         output=str(tmp_path / name / "draft"))  # fmt: skip
        reports.append((folder / "report.md").read_text())
    assert reports[0] == reports[1]
    assert re.search(r"- click: mean 0\.[1-9]", reports[0])
    assert "predicts 'click' with AUC" in reports[0]


def test_a_value_that_implies_a_label_and_a_likely_identifier_are_flagged(prepare, tmp_path):
    rows, draw = table(2000), np.random.default_rng(1)
    bought = rows["buy"].to_numpy() > 0
    stars = np.where(bought & (draw.random(2000) < 0.4), draw.random(2000) * 5, np.nan)
    rows = rows.with_columns(
        reviewed=(bought & (draw.random(2000) < 0.4)).astype(int),
        stars=pl.Series(stars).fill_nan(None),
    ).drop("basket", "hint")
    rows.write_parquet(tmp_path / "shop.parquet")
    columns = Columns(("click", "buy"), user="reader", time="day")
    report = (prepare(tmp_path / "shop.parquet", table=columns) / "report.md").read_text()
    assert re.search(r"'reviewed': in all \d+ rows with a value of '1', 'buy' is 1: it may", report)
    assert re.search(r"'stars': in all \d+ rows with a value that is not missing, 'buy' is", report)
    assert "'city'" not in report
    assert "'price'" not in report
    assert "- book: dense, 90 numbers, side context; each occurs often: an identifier" in report
    columns = Columns(("click", "buy"), "reader", "book", "day", drop=("reviewed", "stars"))
    folder = prepare(tmp_path / "shop.parquet", table=columns, output=str(tmp_path / "better"))
    report = (folder / "report.md").read_text()
    assert "no value of one implies a label" in report
    assert "each occurs often" not in report


def test_a_schema_is_written_without_what_is_by_default():
    values = {
        "tasks": [{"name": "a", "mask": "seen"}, {"name": "b", "weight": 0.5}],
        "sparse": [{"name": "u", "side": "user"}, {"name": "v", "min_count": 3}],
        "dense": [{"name": "x", "scaling": "buckets", "buckets": 4}],
        "sequences": [{"name": "h", "of": "v", "encoder": "transformer", "side": "user"}],
        "crossed": [{"of": ["u", "v"], "buckets": 20}],
        "user": "u",
    }
    schema = FeatureSchema.from_dict(values)
    written = plain(schema)
    assert FeatureSchema.from_dict(json.loads(json.dumps(written))) == schema
    assert written["sparse"] == [{"name": "u", "side": "user"}, {"name": "v", "min_count": 3}]
    assert written["sequences"] == [{"name": "h", "of": "v", "encoder": "transformer"}]
    assert "dim" not in written
