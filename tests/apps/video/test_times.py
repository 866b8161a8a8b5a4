"""Hours and weekdays of a column of times: drafted, and alike wherever rows come from."""

import datetime
import json

import numpy as np
import polars as pl
import pytest
import torch

from apps.video.score import ShardWriter
from core_gates.errors import GatesError
from harness.runs.loops import ExactTrainer
from recsys import MultiTaskModule, OwnTable, TableDataModule
from recsys.columns.canonical import UNREADABLE, holds_times, part_of
from recsys.data.readers.files import find_parts
from recsys.infer import infer_schema, plain
from recsys.metrics import auc
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema, Sparse
from recsys.table_scorer import Model, TableScorer
from recsys.transform import FeatureTransform
from video_multitask.service.ranking_scorer import RequestReader, made_up

pytestmark = pytest.mark.fault("46 R5")
N, FIRST = 6_000, 1_704_067_200  # Monday, 2024-01-01 00:00 UTC
NAMES = ("hour of at", "weekday of at")
SAME = {
    "s": lambda s: s,
    "ms": lambda s: s * 1000 + 999,
    "s with missing ones, as pandas reads them": lambda s: s.cast(pl.Float64),
    "s in text": lambda s: s.cast(pl.String),
    "datetime": pl.from_epoch,
    "ns in another zone": lambda s: (
        pl.from_epoch(s).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")
    ),
    "text": lambda s: pl.from_epoch(s).dt.strftime("%Y-%m-%d %H:%M:%S"),
    "text with T and Z": lambda s: pl.from_epoch(s).dt.strftime("%Y-%m-%dT%H:%M:%S.123Z"),
    "text with UTC": lambda s: pl.from_epoch(s).dt.strftime("%Y/%m/%d %H:%M UTC"),
    "text of another zone": lambda s: (
        (pl.from_epoch(s) + pl.duration(hours=9)).dt.strftime("%Y-%m-%d %H:%M:%S+09:00")
        if isinstance(s, pl.Expr)
        else (pl.from_epoch(s) + datetime.timedelta(hours=9)).dt.strftime("%Y-%m-%dT%H:%M:%S+0900")
    ),
}

FRACTIONS = {
    "fractions": lambda s: s + 0.25,
    "fractions of ms": lambda s: s * 1000 + 999.5,
    "fractions in text": lambda s: (s + 0.25).cast(pl.String),
}


@pytest.fixture(scope="module")
def log():
    """Rows of four weeks; only from 18 to 23 o'clock things are bought often."""
    draw = np.random.default_rng(0)
    at = FIRST + np.sort(draw.integers(0, 28 * 86_400, N))
    late = at // 3600 % 24 >= 18
    bought = draw.random(N) < np.where(late, 0.8, 0.2)
    return pl.DataFrame({"at": at, "price": draw.normal(size=N), "bought": bought.astype(int)})


@pytest.mark.parametrize("form", SAME)
def test_parts_are_those_of_the_calendar_in_utc(form, log):
    times = [datetime.datetime.fromtimestamp(s, datetime.UTC) for s in log["at"].to_list()]
    column = SAME[form](log["at"])
    assert holds_times(column)
    assert part_of(column, "hour").to_list() == [one.hour for one in times]
    assert part_of(column, "weekday").to_list() == [one.isoweekday() for one in times]


@pytest.mark.parametrize(
    ("column", "hours"),
    [
        ([FIRST, None, 0, -1, 12, 5 * 10**9, 2**63 - 1], [0, None, None, None, *[UNREADABLE] * 3]),
        ([FIRST + 7200.0, float("nan"), float("inf"), 1e300], [2, None, None, UNREADABLE]),
        (
            ["2024-01-31", "2024-01-31 24:00", "0000-00-00", "yesterday", "", None, "31.01.2024"],
            [0, *[UNREADABLE] * 3, None, None, UNREADABLE],
        ),
        ([None, None], [None, None]),
        ([datetime.date(1950, 1, 1), None], [0, None]),
    ],
)
def test_missing_times_stay_missing_and_others_are_unknown(column, hours):
    assert part_of(pl.Series(column, strict=False), "hour").to_list() == hours


def test_what_holds_no_times():
    for column in ([1, 2, 3], [20240131, 20240201], ["a", "b"], [None], [1.7e8 + 0.5] * 9):
        assert not holds_times(pl.Series(column))
    assert not holds_times(pl.Series([datetime.time(3)]))
    assert not holds_times(pl.Series([[1_700_000_000]]))
    assert holds_times(pl.Series([FIRST] * 99 + [0, 7]))


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("key", ["at", ""])
def test_a_draft_has_hour_and_weekday_whatever_times_are_written_in(form, key, log):
    found = infer_schema(log.with_columns(SAME[form](log["at"]).alias("at")), ["bought"], time=key)
    assert found.schema.sparse == (
        Sparse("hour of at", column="at", part="hour"),
        Sparse("weekday of at", column="at", part="weekday"),
    )
    assert [feature.name for feature in found.schema.dense] == ["price"]
    assert found.schema.features == ("at", "price")
    assert FeatureSchema.from_dict(plain(found.schema)) == found.schema
    notes = dict(str(note).split(": ", 1) for note in found.notes)
    assert notes["hour of at"] == "sparse, 24 values, in UTC, side context"
    assert ("it orders the rows" in notes["at"]) == bool(key)
    assert key or notes["at"] == "left out, times, whose hour and weekday is a feature"


def test_of_few_days_no_weekday_is_drafted_and_of_dates_no_hour(log):
    few = infer_schema(log.filter(pl.col("at") < FIRST + 6 * 86_400), ["bought"]).schema
    assert [feature.name for feature in few.sparse] == ["hour of at"]
    dates = log.with_columns(pl.from_epoch("at").dt.date())
    assert [f.name for f in infer_schema(dates, ["bought"]).schema.sparse] == ["weekday of at"]
    assert infer_schema(log, ["bought"], drop=["at"]).schema.features == ("price",)


def test_an_hour_that_training_lacks_is_not_unknown(log):
    early = log.filter(pl.col("at") // 3600 % 24 < 20)
    transform = FeatureTransform(infer_schema(early, ["bought"]).schema).fit(early)
    assert transform.sizes == {"hour of at": 26, "weekday of at": 9}
    found = transform.encode(log).sparse
    assert np.array_equal(found[:, 0], 2 + log["at"].to_numpy() // 3600 % 24)
    assert np.array_equal(transform.grow(log).encode(log).sparse, found)


GARBAGE = {
    "s": [None, 0, -5, 7, 2**62],
    "datetime": [None, None],
    "text": [None, "", "yesterday", "0000-00-00 00:00:00"],
}
ROWS = {"s": [1, 1, 1, 0, 0], "datetime": [1, 1], "text": [1, 1, 0, 0]}  # missing 1, unknown 0


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("form", GARBAGE)
def test_files_and_requests_have_the_features_of_training(form, suffix, log, tmp_path):
    at = pl.concat([SAME[form](log["at"][:2000]), pl.Series(GARBAGE[form], strict=False)])
    rows = log[: len(at)].with_columns(at)
    path = tmp_path / f"log{suffix}"
    (rows.write_csv if suffix == ".csv" else rows.write_parquet)(path)
    tables = OwnTable(str(path), ["bought"]).read()
    transform = FeatureTransform(tables.schema).fit(tables.train)
    transform.save(tmp_path / "transform")
    transform = FeatureTransform.load(tmp_path / "transform")
    expected = transform.encode(rows)
    assert set(NAMES) <= set(transform.sparse_tables)
    parts = [name in NAMES for name in transform.sparse_tables]
    found = expected.sparse[-len(GARBAGE[form]) :, parts]
    assert found.tolist() == [[row, row] for row in ROWS[form]]
    assert expected.sparse[:2000, parts].min() == 2

    (part,) = find_parts([path])
    blocks = [transform.encode(block) for block in part.blocks(tables.schema.features, [])]
    assert np.array_equal(np.concatenate([b.sparse for b in blocks]), expected.sparse)

    reader = RequestReader(transform, ("bought",))
    assert reader.kinds["at"] == "time"
    candidates = json.loads(json.dumps(reader.typed(rows).to_dicts()))
    found = reader.table([reader.read({"candidates": candidates}, 5000)])
    assert np.array_equal(transform.encode(found).sparse, expected.sparse)
    if form == "s":
        numbers = [{**c, "at": t} for c, t in zip(candidates, at.to_list(), strict=True)]
        found = reader.table([reader.read({"candidates": numbers}, 5000)])
        assert np.array_equal(transform.encode(found).sparse, expected.sparse)
    assert transform.encode(made_up(transform, 50)).sparse[:, parts].min() >= 2


@pytest.mark.usefixtures("recwarn")
def test_a_label_of_the_hour_alone_is_learned_by_the_draft_alone(log, tmp_path):
    log.write_parquet(tmp_path / "log.parquet")
    data = TableDataModule(OwnTable(str(tmp_path / "log.parquet"), ["bought"], time="at"), 128)
    torch.manual_seed(0)
    module = MultiTaskModule("Linear", learning_rate=0.05)
    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = dict.fromkeys(parts, False) | {"default_root_dir": tmp_path, "num_sanity_val_steps": 0}
    ExactTrainer(accelerator="cpu", max_epochs=2, **quiet).fit(module, data)
    batch = data.batch("test")
    with torch.no_grad():
        logits = module.served()(batch.sparse, batch.dense, batch.sequences)
    assert auc(logits[:, 0].numpy(), batch.labels[:, 0].numpy()).value > 0.72


@pytest.fixture
def model(log):
    """An untrained one of hour and weekday, fitted to times in seconds."""
    transform = FeatureTransform(infer_schema(log, ["bought"], time="at").schema).fit(log)
    ranker = Ranker.build(transform.schema, transform.sizes, transform.dense_width, "Linear", {})
    return Model("name", TableScorer(ranker, transform))


def scored(model, path, out):
    """Predictions of a file and what is said of them."""
    writer, (part,) = ShardWriter(model, [0], None, {}), find_parts([path])
    assert list(writer.write(part, out, ["at"], {}))
    return pl.read_parquet(out), list(writer.doubts())


@pytest.mark.fault("46 R4")
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_times_that_are_wholly_missing_are_told_once(suffix, log, model, tmp_path):
    rows, path = log[:50].with_columns(at=pl.lit(None)), tmp_path / f"none{suffix}"
    (rows.write_csv if suffix == ".csv" else rows.write_parquet)(path)
    _, said = scored(model, path, tmp_path / "out.parquet")
    assert [line for line in said if "price" not in line] == ["WARNING: at: no row holds a value"]


@pytest.mark.fault("46 R4")
@pytest.mark.parametrize(
    "form", ["text with T and Z", "text with UTC", "text of another zone", "fractions", "s in text"]
)
def test_times_may_be_written_otherwise_than_in_training(form, log, model, tmp_path):
    """Text in ISO 8601 and fractions are the same features, and keys stay as they are."""
    made = (SAME | FRACTIONS)[form](log["at"][:50])
    rows, path = log[:50].with_columns(made.alias("at")), tmp_path / "log.csv"
    rows.write_csv(path)
    keys, said = scored(model, path, tmp_path / "out.parquet")
    assert keys["at"].cast(pl.String).to_list() == made.cast(pl.String).to_list()
    expected = model.scorer.score(log[:50]).probabilities[:, 0]
    assert np.array_equal(keys["p_bought"].to_numpy(), expected)
    assert not [line for line in said if "at" in line.split(":")[0]]


@pytest.mark.fault("46 R4")
def test_times_that_are_none_or_change_their_form_within_a_file_are_one_line(
    log, model, tmp_path, monkeypatch
):
    texts = log["at"].cast(pl.String)
    for name, column, words in (
        ("none", texts.set(log["at"].is_first_distinct(), "soon"), "'soon' is no integer, unlike"),
        (
            "both",
            pl.concat([texts[:4000], SAME["text"](log["at"][4000:])]),
            "both.csv: a column changes from numbers to text below row ",
        ),
    ):
        path = tmp_path / f"{name}.csv"
        log.with_columns(column.alias("at")).write_csv(path)
        monkeypatch.setattr("recsys.data.readers.files.CSV_BLOCK", 2**15)
        with pytest.raises(GatesError, match=words) as caught:
            scored(model, path, tmp_path / "out.parquet")
        assert "\n" not in str(caught.value)


@pytest.mark.fault("46 R4")
@pytest.mark.parametrize("form", ["fractions", "fractions of ms", "fractions in text"])
def test_fractions_of_seconds_are_times(form, log):
    column = FRACTIONS[form](log["at"])
    assert holds_times(column)
    for part in ("hour", "weekday"):
        assert part_of(column, part).equals(part_of(log["at"], part))
