"""Faulty inputs of ``gates video``: one line with file, line and column, or documented handling."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import yaml

ROWS, LINE = 400, 9  # line of row 7 in a file with a header
INIT = "data.source.init_args"
NET = {"dim": 4, "hidden_dims": [4], "tower_dims": [4]}
TABLE = "recsys.data.readers.own_table.OwnTable"


def table():
    """A log with numbers, quoted ranges with commas, and two labels."""
    draw = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "user": draw.integers(0, 30, ROWS),
            "item": draw.integers(0, 50, ROWS),
            "day": np.sort(draw.integers(1, 30, ROWS)),
            "price": draw.gamma(2.0, 9.0, ROWS).round(2),
            "range": draw.choice(["(0,10]", "(10,50]"], ROWS),
            "duration": draw.integers(1000, 9000, ROWS),
            "click": draw.integers(0, 2, ROWS),
            "buy": draw.integers(0, 2, ROWS),
        }
    )


GOOD = table()
TEXT = GOOD.write_csv()
LINES = TEXT.splitlines()


def cell(column, value):
    """Return the log as CSV with another value in row 7."""
    changed = GOOD.cast({column: pl.String}).with_columns(
        pl.when(pl.int_range(ROWS) == 7).then(pl.lit(value)).otherwise(column).alias(column)
    )
    return changed.write_csv()


def lines(number, *instead):
    """Return the log as CSV with other lines instead of one of that number."""
    return "\n".join([*LINES[: number - 1], *instead, *LINES[number:]]) + "\n"


def parquet(frame, *, cut=0):
    def write(path):
        frame.write_parquet(path)
        path.write_bytes(path.read_bytes()[: -cut or None])

    return write


def folder_of(**writers):
    """Write files into a new folder."""

    def write(path):
        path.mkdir()
        for name, content in writers.items():
            file = path / name.replace("_", ".")
            content(file) if callable(content) else file.write_text(content)

    return write


def fit(*words, path="bad.csv", verb="fit", **init):
    given = {"path": path, "labels": "[click, buy]", "time": "day", "user": "user", "item": "item"}
    options = [w for n, value in (given | init).items() for w in (f"--{INIT}.{n}", value)]
    return ("video", verb, "--config", "own", "--name", "faulty", *options, *words)


def evaluate(*words):
    return fit(*words, path="good.csv", verb="evaluate")


def score(*words, source="bad.csv", model="runs/video/own/model"):
    return ("video", "score", source, "--model", model, "--output", "out", *words)


def copied(*, of, damage):
    """Copy a folder of the workplace and damage it."""

    def write(path):
        shutil.copytree(path.parent / of, path)
        damage(path)

    return write


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def other_transform(folder):
    path = max(folder.glob("transform/*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes() + b" ")


def edit(name, change, of="feed"):
    """Copy the feed with one of its files changed."""

    def damage(folder):
        (path,) = folder.glob(f"data/{name}*.csv")
        path.write_text(change(path.read_text()))

    return copied(of=of, damage=damage)


def shard(folder):
    path = min(folder.glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-9])


def prepare(*words):
    return ("video", "prepare", "bad", "--output", "shards", *words)


def release(**init):
    kind = "video_multitask.sources.kuairand.KuaiRandTables"
    given = {"path": "bad", "history": 0, **init}
    options = [w for n, value in given.items() for w in (f"--{INIT}.{n}", value)]
    return ("video", "fit", "--config", "pure", "--data.source.class_path", kind, *options)


def known(name, **init):
    """Train on a data set of which only the place is another."""
    options = [w for n, value in init.items() for w in (f"--{INIT}.{n}", value)]
    return ("video", "fit", "--config", name, "--name", "faulty", *options)


def serve(*words, verb="serve"):
    return ("video", verb, "--model", "runs/video/own/model", *words)


def foreign(verb, *words):
    return ("video", verb, "--model", "bad", *words)


FOREIGN = {"bad": folder_of(config_json='{"kind": "a model of another program"}')}
BAD = "bad.csv"
FAULTS = {
    # Tables.
    "empty file": (fit(), "bad.csv is empty: a line with the names of the columns", {BAD: ""}),
    "header alone": (fit(), "bad.csv has no rows: name a table", {BAD: f"{LINES[0]}\n"}),
    "missing file": (fit(), "by --data.source.init_args.path"),
    "other format": (fit(path="bad.xls"), "bad.xls is no table that can be read", {"bad.xls": "a"}),
    "folder without tables": (
        fit(path="bad"), "bad holds no .parquet", {"bad": folder_of(notes_txt="a")},
    ),
    "blank line": (fit(), "bad.csv, line 6: it is blank, but not the last", {BAD: lines(6, "")}),
    "field too many": (
        fit(),
        "bad.csv, line 6: it has 9 fields, the header has 8: correct the line",
        {BAD: lines(6, f"{LINES[5]},1")},
    ),
    "ranges without quotes": (
        fit(),
        "bad.csv, line 2: it has 9 fields, the header has 8.*quote fields that contain the sep",
        {BAD: TEXT.replace('"', "")},
    ),
    "open quote": (
        fit(),
        "bad.csv, line 7: .*close or double its quotes",
        {BAD: lines(6, LINES[5].replace(']"', "]"))},
    ),
    "column twice": (
        fit(),
        "bad.csv, line 1: it has two columns named 'user'",
        {BAD: TEXT.replace("item,", "user,", 1)},
    ),
    "Latin-1": (
        fit(),
        "bad.csv, line 2: byte .* is not UTF-8",
        {BAD: TEXT.replace(LINES[1], LINES[1].replace("(", "ä")).encode("latin-1")},
    ),
    "truncated Parquet": (
        fit(path="bad.parquet"),
        "bad.parquet cannot be read as Parquet: .*; it is damaged or incomplete",
        {"bad.parquet": parquet(GOOD, cut=9)},
    ),
    "missing label": (fit(), "bad.csv: the table lacks 'buy'", {BAD: GOOD.drop("buy").write_csv()}),
    "missing user": (fit(user="usr"), "the table lacks 'usr'", {BAD: TEXT}),
    "label of 2": (
        fit(),
        f"bad.csv, line {LINE}, column 'buy': it is 2, a label or mask must be 0 or 1",
        {BAD: cell("buy", "2")},
    ),
    "missing value of a label": (
        fit(),
        f"bad.csv, line {LINE}, column 'buy': it is missing",
        {BAD: cell("buy", None)},
    ),
    "NaN as a label": (
        fit(path="bad.parquet"),
        r"bad.parquet, row 7, column 'buy': it is (missing|NaN)",
        {"bad.parquet": parquet(GOOD.with_columns(
            pl.when(pl.int_range(ROWS) == 7).then(pl.lit(np.nan)).otherwise("buy").alias("buy")
        ))},
    ),
    "word as a label": (
        fit(),
        f"bad.csv, line {LINE}, column 'buy': 'yes' is no number",
        {BAD: cell("buy", "yes")},
    ),
    "missing time": (
        fit(),
        f"bad.csv, line {LINE}, column 'day': it has no time; give one",
        {BAD: cell("day", None)},
    ),
    "missing time in the second file": (
        fit(path="bad"),
        f"bad/b.csv, line {LINE}, column 'day': it has no time",
        {"bad": folder_of(a_parquet=parquet(GOOD), b_csv=cell("day", None))},
    ),
    "file without a column of the first": (
        fit(path="bad"),
        "bad/b.parquet lacks the column 'price', which a.parquet has",
        {"bad": folder_of(a_parquet=parquet(GOOD), b_parquet=parquet(GOOD.drop("price")))},
    ),
    "lists in one file, numbers in another": (
        fit(path="bad"),
        r"bad/b.parquet: column 'price' has type List\(Int64\), in an earlier file it has numbers",
        {
            "bad": folder_of(
                a_parquet=parquet(GOOD), b_parquet=parquet(GOOD.with_columns(price=pl.lit([1, 2])))
            )
        },
    ),
    "nothing to validate on": (
        fit(path="good.csv", validation="0", test="0"),
        "the validation part of good is empty: give it rows",
    ),
    # What columns are.
    "label among the features": (
        fit(path="good.csv", schema="{tasks: [{name: click}], sparse: [{name: click}]}"),
        "columns click are both label and feature: a label among the features gives a perfect",
    ),
    "label as the user": (fit(path="good.csv", user="click"), "the user 'click' is a label"),
    "no label": (fit(path="good.csv", labels="[]"), "name the labels, columns with 0 and 1"),
    "label twice": (fit(path="good.csv", labels="[buy, buy]"), "tasks are named twice: buy"),
    "list column of numbers": (
        fit(
            path="bad.parquet",
            schema="{tasks: [{name: click}], sparse: [{name: item}], "
            "sequences: [{name: price, of: item}]}",
        ),
        "column 'price' has type .*, a history needs lists",
        {"bad.parquet": parquet(GOOD)},
    ),
    "text as a number": (
        fit(path="good.csv", schema="{tasks: [{name: click}], dense: [{name: range}]}"),
        r"good.csv, line 2, column 'range': '\(\d+,\d+\]' is no number",
    ),
    "feature that is not there": (
        fit(path="good.csv", schema="{tasks: [{name: click}], sparse: [{name: usr}]}"),
        r"good.csv: the table lacks 'usr' \(did you mean 'user'\?\)",
    ),
    "unknown entry of a schema": (
        fit(path="good.csv", schema="{tasks: [{name: click}], sparse: [{nam: user}]}"),
        "the schema has an entry that is not known: .*'nam'",
    ),
    # Options of the command line and of files.
    "unknown network": (
        fit("--model.net", "Home", path="good.csv"),
        r"there is no network 'Home' \(did you mean 'HoME'\?\)",
    ),
    "unknown option of a network": (
        fit("--model.options", "{dimm: 3}", path="good.csv"),
        r"no option 'dimm' \(did you mean 'dim'\?\)",
    ),
    "negative learning rate": (
        fit("--model.learning_rate", "-1", path="good.csv"),
        "learning_rate must be positive, got -1.0",
    ),
    "prior of no feature": (
        fit("--model.prior", "[nope]", path="good.csv"),
        "MMoE takes no prior, but prior names nope: leave it out",
    ),
    "word as a number": (
        fit("--data.batch_size", "many", path="good.csv"),
        "data.batch_size: expected int, found 'many'",
    ),
    "batches of one row": (
        fit("--data.batch_size", "1", path="good.csv"),
        "a training batch has 1 rows.*raise batch_size",
    ),
    "unknown split": (
        fit(path="good.csv", split="usr"),
        "split: expected 'time', 'user', 'row' or null, found 'usr'",
    ),
    "split that leaves nothing": (
        fit(path="good.csv", test="0.9", validation="0.2"),
        "validation 0.2 and test 0.9 leave no rows to train on",
    ),
    "unknown source": (
        fit("--data.source.class_path", "recsys.Nope", path="good.csv"),
        "data.source: recsys.Nope: module 'recsys' has no attribute 'Nope'",
    ),
    "misspelled option": (
        fit("--data.batchsize", "3", path="good.csv"),
        r"unrecognized arguments: --data.batchsize 3 \(did you mean --data.batch_size\?\)",
    ),
    "unknown score to keep the best by": (
        fit("--checkpoint.monitor", "val/lss", path="good.csv"),
        "checkpoint.monitor 'val/lss' is not logged; logged are train/loss, val/auc_buy",
    ),
    "damaged checkpoint": (
        fit("--ckpt_path", "x.ckpt", path="good.csv"),
        "x.ckpt is damaged or not a checkpoint",
        {"x.ckpt": b"no checkpoint"},
    ),
    "no YAML": (
        ("video", "fit", "--config", "bad.yaml"),
        "bad.yaml line 2 is not valid YAML",
        {"bad.yaml": "a: [1\n"},
    ),
    "run folder below a file": (
        (*fit(path="good.csv"), "--root", "good.csv"),
        "good.csv/video/faulty cannot be written: Not a directory",
    ),
    # Contests.
    "unknown method": (evaluate("--only", "[hoem]"), "--only names 'hoem'; known are home, mmoe"),
    "no seed": (evaluate("--seeds", "[]"), "--seeds names none: give one at least"),
    "claim about no method": (
        evaluate("--claims", "{beats: [ple]}"),
        "claims name 'ple'.*known are home, mmoe, rates",
    ),
    "unknown claim": (evaluate("--claims", "{beat: [mmoe]}"), "does not accept 'beat'"),
    "no trial": (evaluate("--contest.trials", "0"), "trials must be at least 1, got 0"),
    "box with one end": (
        evaluate("--contest.space", '{"model.learning_rate": [1]}'),
        r"space of model.learning_rate is \[1.0\], expected two numbers",
    ),
    "box upside down": (
        evaluate("--contest.space", '{"model.learning_rate": [1, 0.1]}'),
        "searched from 1.0 to 0.1: expected positive numbers, the lower one first",
    ),
    "unknown baseline": (
        evaluate("--contest.baselines", "{t: {kind: tree}}"),
        "kind of the baseline 't' is 'tree'; choose one of base_rates",
    ),
    "baseline of no number": (
        evaluate("--contest.baselines", "{t: {kind: one_column, column: user}}", "--only", "[t]"),
        "error: t: column of a baseline is 'user'; choose one of price",
    ),
    "unknown entry of a method": (
        evaluate("--contest.methods", "{home: {nett: MMoE}}"),
        "method 'home' has nett; known are net, options, settings, sized",
    ),
    "unknown setting of a method": (
        evaluate("--contest.methods", "{home: {settings: {model.lr: 3}}}", "--only", "[home]"),
        "error: home: model: .*unexpected keyword argument 'lr'",
    ),
    "controls without a simulator": (
        evaluate("--controls"), "data.source OwnTable cannot permute its labels or plant a leak",
    ),
    "a truncated Parquet as a log": (
        ("video", "prepare", "cut.parquet", "--output", "archive"),
        "cut.parquet cannot be read: .*; repair or remove it",
        {"cut.parquet": parquet(GOOD, cut=9)},
    ),
    "an archive as a log": (
        ("video", "prepare", "bad.csv", "--output", "archive"),
        "bad.csv, line 1: byte 2 is not UTF-8: save the file in that encoding",
        {BAD: b"\x1f\x8b\x9a\xff\n" * 40},
    ),
    # Scoring and export.
    "score a missing column": (
        score(),
        "bad.csv: the table lacks 'price'",
        {BAD: GOOD.drop("price").write_csv()},
    ),
    "score a word": (
        score(),
        f"bad.csv, line {LINE}, column 'price': 'x' is no number",
        {BAD: cell("price", "x")},
    ),
    "score an empty file": (score(), "bad.csv is empty: a line", {BAD: ""}),
    "score truncated Parquet": (
        score(source="bad.parquet"),
        "bad.parquet cannot be read as Parquet",
        {"bad.parquet": parquet(GOOD, cut=9)},
    ),
    "foreign model folder": (
        score(source="good.csv", model="bad"),
        "bad is no model folder, its config.json is of kind None",
        {"bad": folder_of(config_json="{}")},
    ),
    "model folder without a model": (
        score(source="good.csv", model="runs"), "runs is no model folder, it has no config.json",
    ),
    "weights with a wrong checksum": (
        score(source="good.csv", model="bad"),
        "bad/model.safetensors is damaged, its digest is wrong",
        {"bad": copied(of="runs/video/own/model", damage=cut_weights)},
    ),
    "score no task": (
        score("--tasks", "[like]", source="good.csv"), "the model has no task 'like'",
    ),
    "output below a file": (
        (*score(source="good.csv"), "--output", "good.csv/x"),
        "good.csv/x/record.json cannot be written: Not a directory",
    ),
    "output that cannot be written": (
        (*score(source="good.csv"), "--output", "/proc/none"),
        "/proc/none/record.json cannot be written",
    ),
    "unknown form of export": (
        ("video", "export", "--name", "own", "--formats", "[tflite]"),
        "formats: expected 'torch', 'aoti', 'onnx', found 'tflite'",
    ),
    # Model folders.
    "serve a foreign folder": (foreign("serve", "--port", "0"), "bad is no model folder", FOREIGN),
    "load test of a foreign folder": (foreign("loadtest"), "bad is no model folder", FOREIGN),
    "export a foreign folder": (foreign("export"), "bad is no model folder", FOREIGN),
    "plan a foreign folder": (foreign("plan"), "bad is no model folder", FOREIGN),
    "swap to a foreign folder": (
        serve("--swap_to", "bad", verb="loadtest"), "bad is no model folder", FOREIGN,
    ),
    "serve damaged weights": (
        foreign("serve", "--port", "0"),
        "bad/model.safetensors is damaged, its digest is wrong",
        {"bad": copied(of="runs/video/own/model", damage=cut_weights)},
    ),
    "serve vocabularies of another day": (
        foreign("serve", "--port", "0"),
        r"bad/\S+ is damaged, its digest is wrong",
        {"bad": copied(of="runs/video/own/model", damage=other_transform)},
    ),
    "load test with a column too few": (
        serve("--rows", BAD, verb="loadtest"),
        "the table lacks 'price'",
        {BAD: GOOD.drop("price").write_csv()},
    ),
    "load test without rows": (
        serve("--rows", BAD, verb="loadtest"), "bad.csv has no rows", {BAD: f"{LINES[0]}\n"},
    ),
    # Public data sets.
    "truncated census": (
        known("census", path="bad.parquet"),
        "bad.parquet cannot be read as Parquet",
        {"bad.parquet": parquet(GOOD, cut=9)},
    ),
    "census of another table": (
        known("census", path="bad.parquet"),
        "bad.parquet",
        {"bad.parquet": parquet(GOOD)},
    ),
    "empty MovieLens": (
        known("movielens", path="bad.parquet"), "bad.parquet", {"bad.parquet": b""},
    ),
    "explicit log of another table": (
        known("explicit", path="bad.parquet", users_path="bad.parquet"),
        "bad.parquet lacks the column 'user_id'",
        {"bad.parquet": parquet(GOOD)},
    ),
    "country of another table": (
        known("aliexpress", path="bad"),
        "bad/train.csv has 8 columns besides its index, expected 16 categorical ones",
        {"bad": folder_of(train_csv=TEXT)},
    ),
    # Values of tables.
    "time of words and numbers": (
        fit(),
        f"bad.csv, line {LINE}, column 'day': ",
        {BAD: cell("day", "yesterday")},
    ),
    "NaN as a time": (
        fit(path="bad.parquet"),
        "bad.parquet, row 7, column 'day': ",
        {"bad.parquet": parquet(GOOD.with_columns(
            pl.when(pl.int_range(ROWS) == 7).then(pl.lit(np.nan)).otherwise("day").alias("day")
        ))},
    ),
    "score dates as numbers": (
        score(source="bad.parquet"),
        "bad.parquet: column 'price' has type Date",
        {"bad.parquet": parquet(GOOD.with_columns(price=pl.date(2022, 4, 8)))},
    ),
    "score records as ids": (
        score(source="bad.parquet"),
        "bad.parquet: column 'item' has type Struct",
        {"bad.parquet": parquet(GOOD.with_columns(item=pl.struct("item")))},
    ),
    # Feeds of Kuaishou.
    "negative user": (
        prepare(),
        r"log_standard_4_08_to_4_21_simulated.csv, line 2, column user_id: -7, expected a whole",
        {"bad": edit("log_standard_4_08", lambda t: t.replace("\n", "\n-7", 1).replace(
            f"-7{t.splitlines()[1].split(',')[0]},", "-7,", 1))},
    ),
    "flag of 2": (
        prepare(),
        "line 3, column is_like: 2, expected a whole number from 0 to 1",
        {"bad": edit("log_standard_4_08", lambda t: with_field(t, 3, "is_like", "2"))},
    ),
    "negative time": (
        prepare(),
        "line 3, column time_ms: -5, expected",
        {"bad": edit("log_standard_4_08", lambda t: with_field(t, 3, "time_ms", "-5"))},
    ),
    "log cut in a line": (
        prepare(),
        r"log_standard_4_22.*line \d+: \d+ fields, expected the 27 of the header",
        {"bad": edit("log_standard_4_22", lambda t: t[:-40])},
    ),
    "log without rows": (
        prepare(),
        "log_standard_4_22.*no rows",
        {"bad": edit("log_standard_4_22", lambda t: f"{t.splitlines()[0]}\n")},
    ),
    "ranges of users without quotes": (
        prepare(),
        r"user_features_simulated.csv, line \d+",
        {"bad": edit("user_features", lambda t: t.replace('"', ""))},
    ),
    "no release": (prepare(), "bad does not exist: name a KuaiRand folder or a log, or get"),
    "shard that was changed": (
        release(),
        r"bad/20220408.parquet.*(changed|damaged|digest|bytes|size)",
        {"bad": copied(of="shards0", damage=shard)},
    ),
    "simulate nothing": (("video", "simulate", "--rows", "0"), "rows must be at least 1, got 0"),
}  # fmt: skip


def with_field(text, line, column, value):
    rows = text.splitlines()
    fields = rows[line - 1].split(",")
    fields[rows[0].split(",").index(column)] = value
    return "\n".join([*rows[: line - 1], ",".join(fields), *rows[line:]]) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory, gates_in):
    """A good table and a model of it, a good feed and its shards; not to be changed."""
    gates = gates_in(tmp_path_factory.mktemp("faulty"))
    folder = gates.folder
    source = {"class_path": TABLE, "init_args": {"path": "good.csv", "labels": ["click", "buy"]}}
    contest = {
        "methods": {"home": {"net": "MMoE"}, "mmoe": {"net": "MMoE", "sized": False}},
        "baselines": {"rates": {"kind": "base_rates"}},
    }
    own = {
        "model": {"net": "MMoE", "options": NET},
        "data": {"source": source, "batch_size": 64},
        "trainer": {"max_epochs": 1},
        "contest": contest,
        "evaluate": {"seeds": [0]},
    }
    (folder / "good.csv").write_text(TEXT)
    (folder / "own.yaml").write_text(yaml.safe_dump(own))
    (folder / "pure.yaml").write_text(yaml.safe_dump({"model": own["model"]}))
    gates.video("fit", f"--{INIT}.time", "day", config="own")
    gates.succeed(*score(source="good.csv"))
    feed = ("--rows", 900, "--users", 30, "--videos", 60, "--days", 20, "--output", "feed")
    gates.succeed("video", "simulate", *feed)
    gates.succeed("video", "prepare", "feed", "--output", "shards0")
    return gates


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_call_is_one_line_and_changes_nothing(fault, place, faulty_inputs):
    faulty_inputs({fault: FAULTS[fault]}, run=place, folder=place.folder)


def test_there_are_more_faults_than_were_asked_for():
    assert len(FAULTS) >= 20


def weights(gates, name, path):
    """Train on a table with the drafted schema and return the weights."""
    source = json.dumps({"class_path": TABLE, "init_args": SCHEMA(gates) | {"path": str(path)}})
    gates.video("fit", "--data.source", source, "--name", name, config="own")
    return (gates.folder / f"runs/video/{name}/weights/fit-s0/result.safetensors").read_bytes()


def SCHEMA(gates):
    path = gates.folder / "drafted/table.yaml"
    if not path.is_file():
        labels = ("--table.labels", "[click, buy]", "--table.time", "day", "--table.user", "user")
        gates.succeed("video", "prepare", "good.csv", *labels, "--output", "drafted")
    return yaml.safe_load(path.read_text())["data"]["source"]["init_args"]


HARMLESS = {
    "Windows line ends": lambda f: (f / "t.csv").write_text(TEXT, newline="\r\n"),
    "byte order mark": lambda f: (f / "t.csv").write_text("\ufeff" + TEXT),
    "shuffled and further columns": lambda f: GOOD.select(
        *sorted(GOOD.columns, reverse=True), pl.lit("x").alias("extra")
    ).write_csv(f / "t.csv"),
    "Parquet and CSV in one folder": lambda f: (
        (f / "t").mkdir(), GOOD[:150].write_parquet(f / "t/a.parquet"),
        GOOD[150:].write_csv(f / "t/b.csv"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_not_matter_gives_the_same_network(case, place, tmp_path):
    HARMLESS[case](tmp_path)
    name = case.replace(" ", "_")
    expected = place.folder / "runs/video" / "plain/weights/fit-s0/result.safetensors"
    if not expected.is_file():
        weights(place, "plain", place.folder / "good.csv")
    assert weights(place, name, next(tmp_path.iterdir())) == expected.read_bytes()


ODD = {
    "negative ids": {"item": -pl.col("item")},
    "missing codes and empty fields": {
        "price": pl.when(pl.int_range(ROWS) % 9 == 0).then(-124.0).otherwise("price"),
        "range": pl.when(pl.int_range(ROWS) % 7 == 0).then(None).otherwise("range"),
    },
    "infinite numbers": {
        "price": pl.when(pl.int_range(ROWS) % 9 == 0).then(np.inf).otherwise("price")
    },
    "duration of 0": {
        "duration": pl.when(pl.int_range(ROWS) % 5 == 0).then(0).otherwise("duration")
    },
    "times out of order": {"day": pl.col("day").shuffle(1)},
    "users of a single class": {"click": pl.col("user") % 2},
    "a label without positives": {"buy": pl.lit(0)},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_rows_are_trained_on_and_scored(case, place, gates_in, tmp_path):
    gates = gates_in(tmp_path)
    shutil.copy(place.folder / "own.yaml", tmp_path)
    GOOD.with_columns(**ODD[case]).write_csv(tmp_path / "good.csv")
    options = (f"--{INIT}.user", "user", f"--{INIT}.time", "day")
    words = ("--contest.methods", "{home: {net: MMoE}}", *options)
    gates.video("evaluate", *words, config="own")
    scores = json.loads((tmp_path / "runs/video/own/scores.json").read_text())
    found = {(r["task"], r["metric"]): r["value"] for r in scores["rows"] if r["method"] == "home"}
    assert np.isfinite(found["test", "summed log_loss"])
    absent = {key for key, value in found.items() if value is None}
    if case == "users of a single class":
        assert ("click", "gauc") in absent
        assert found["click", "auc"] > 0
        assert ("buy", "gauc") not in absent
    elif case == "a label without positives":
        assert {("buy", "auc"), ("buy", "gauc"), ("buy", "pcoc")} <= absent
        assert ("click", "auc") not in absent
    else:
        assert not absent
    assert "NaN" not in (tmp_path / "runs/video/own/scores.json").read_text()


def test_odd_feeds_are_counted_and_kept(place, tmp_path):
    """Durations of 0, missing codes, rows out of order and repeated ones, Windows line ends."""
    folder = tmp_path / "feed"
    shutil.copytree(place.folder / "feed", folder)
    (log,) = folder.glob("data/log_standard_4_08*.csv")
    head, *rows = with_field(log.read_text(), 4, "duration_ms", "0").splitlines()
    rows = [rows[1], rows[0], *rows[2:], rows[-1]]
    log.write_text("\r\n".join([head, *rows]) + "\r\n", newline="")
    (users,) = folder.glob("data/user_features*.csv")
    users.write_text(with_field_quoted(users.read_text(), "is_lowactive_period", "-124"))
    out = place.succeed("video", "prepare", folder, "--output", tmp_path / "shards").out
    assert "901 rows of 20 days" in out
    assert "1 repeated, 1 out of order, 1 without duration" in out


def with_field_quoted(text, column, value):
    frame = pl.read_csv(text.encode(), infer_schema=False)
    return frame.with_columns(pl.lit(value).alias(column)).write_csv()
