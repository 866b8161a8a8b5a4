"""The same rows, as Parquet, as CSV and as a request, are the same to a network."""

import json

import numpy as np
import polars as pl
import pytest

from recsys import FeatureSchema, OwnTable, TableDataModule
from recsys.data.readers.files import find_parts
from recsys.model_folder import load_model, save_model
from recsys.ranker import Ranker
from recsys.table_scorer import read_model
from recsys.transform import FeatureTransform
from video_multitask.service.ranking_scorer import RankingScorer, RequestReader, ScoredRequests

SCHEMA = {
    "tasks": [{"name": "click"}],
    "sparse": [{"name": "book"}, {"name": "genre"}, {"name": "premium"}],
    "dense": [{"name": "price"}, {"name": "gift"}],
    "sequences": [{"name": "last", "of": "book", "max_length": 3, "side": "context"}],
}
ROWS = pl.DataFrame(
    {
        "book": [3, 17, None, 4, 3, 17, 3, 4],
        "genre": ["NA", "crime", None, "poetry", "NA", "crime", "crime", "NA"],
        "premium": [True, False, None, True, False, True, False, True],
        "gift": [True, False, None, False, False, True, True, True],
        "price": [8.5, 9.0, None, 1.25, 2.0, 30.0, 4.0, 7.5],
        "last": [[3, 17], [], None, [4], [4, 4, 3, 17], [17], [], [3]],
        "click": [1, 0, 1, 0, 1, 0, 1, 0],
    },
    schema_overrides={"last": pl.List(pl.Int64)},
)


def csv_of(table, separator=",", space="", word=""):
    """The text of a table, lists separated by bars."""
    bars = pl.col("last").list.eval(pl.element().cast(pl.String)).list.join("|")
    text = table.with_columns(bars).write_csv(separator=separator, null_value=word)
    return text.replace(separator, separator + space)


def write(folder, kind):
    """Write the rows as a file of a kind, and return it."""
    path = folder / f"{kind}.csv"
    if kind == "parquet":
        ROWS.write_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "tab":
        path = path.with_suffix(".tsv")
        path.write_text(csv_of(ROWS, "\t"))
    elif kind == "semicolon":
        path.write_bytes(csv_of(ROWS, ";").replace("\n", "\r\n").encode("utf-8-sig"))
    elif kind == "spaces":
        path.write_text(csv_of(ROWS, space=" "))
    else:
        path.write_text(csv_of(ROWS))
    return path


KINDS = ["parquet", "csv", "tab", "semicolon", "spaces"]


def same(found, expected):
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.sequences[0], expected.sequences[0])


def scored_rows(path, transform):
    """What ``score`` reads of a file."""
    (part,) = find_parts([path])
    lists = [history.name for history in transform.schema.sequences]
    return pl.concat(part.blocks(transform.schema.features, lists, transform.missing))


@pytest.mark.parametrize("missing", [(), ("NA",)])
@pytest.mark.parametrize("trained", KINDS)
def test_every_door_reads_alike(tmp_path, trained, missing):
    source = OwnTable(
        str(write(tmp_path, trained)), schema=SCHEMA, split="row", missing=missing, test=0.1
    )
    data = TableDataModule(source)
    transform = data.transform
    expected = transform.encode(ROWS)
    assert set(expected.sparse[:, 2]) == {1, 2, 3}
    na = expected.sparse[ROWS["genre"].eq("NA").fill_null(False).to_numpy(), 1]
    assert (na == 1).all() if missing else (na > 1).all()
    for part in ("train", "validation", "test"):
        table = data.table(part)
        assert table["premium"].dtype == pl.Boolean
    for kind in KINDS:
        path = write(tmp_path, kind)
        rows = scored_rows(path, transform)
        same(transform.encode(rows), expected)
        same(transform.encode(RequestReader(transform, ["click"]).typed(rows)), expected)
        table = OwnTable(str(path), schema=SCHEMA, split="row", missing=missing)
        joined = pl.concat([*table.read()[2:5]], how="vertical_relaxed")
        assert joined["premium"].to_list().count(True) == 4
    content = {"candidates": ROWS.select(transform.schema.features).to_dicts()}
    reader = RequestReader(transform, ["click"])
    request = reader.read(json.loads(json.dumps(content)), 100)
    same(transform.encode(reader.table([request])), expected)


def test_the_training_reader_reads_all_alike(tmp_path):
    tables = []
    for kind in KINDS:
        folder = tmp_path / kind / "day=1"
        folder.mkdir(parents=True)
        write(folder, kind)
        made = OwnTable(str(folder.parent), schema=SCHEMA, split="row").read()
        tables.append(pl.concat(made[2:5]))
    transform = FeatureTransform(FeatureSchema.from_dict(SCHEMA)).fit(tables[0])
    for table in tables:
        same(transform.encode(table), transform.encode(tables[0]))


def test_words_for_missing_stay_with_the_model(tmp_path):
    (tmp_path / "rows.csv").write_text(csv_of(ROWS, word="NA"))
    source = OwnTable(str(tmp_path / "rows.csv"), schema=SCHEMA, split="row", missing=["NA"])
    transform = TableDataModule(source).transform
    torch_sizes = (transform.sizes, transform.dense_width)
    options = {"hidden_dims": [4], "tower_dims": [4]}
    ranker = Ranker.build(transform.schema, *torch_sizes, "SharedBottom", options)
    loaded = load_model(save_model(tmp_path / "model", ranker, transform)).transform
    assert loaded.missing == ("NA",)
    same(loaded.encode(scored_rows(tmp_path / "rows.csv", loaded)), transform.encode(ROWS))
    assert loaded.grow(ROWS).missing == ("NA",)


def test_a_transform_without_words_is_stored_as_ever(tmp_path):
    transform = FeatureTransform(FeatureSchema.from_dict(SCHEMA)).fit(ROWS)
    content = json.loads((transform.save(tmp_path / "t") / "transform.json").read_text())
    assert "missing" not in content
    assert FeatureTransform.load(tmp_path / "t").missing == ()


def test_a_load_test_asks_for_what_score_reads_in_the_file(tmp_path):
    transform = FeatureTransform(FeatureSchema.from_dict(SCHEMA), ["NA"]).fit(ROWS)
    sizes = (transform.sizes, transform.dense_width)
    options = {"hidden_dims": [4], "tower_dims": [4]}
    ranker = Ranker.build(transform.schema, *sizes, "SharedBottom", options)
    model = read_model(save_model(tmp_path / "model", ranker, transform))
    (tmp_path / "rows.csv").write_text(csv_of(ROWS, word="NA"))
    asked = ScoredRequests({model.version: model})
    asked.make(scored_rows(tmp_path / "rows.csv", transform), 3)
    service = RankingScorer(model, unknown="score")
    for place, body in enumerate(asked.bodies):
        request = service.read(json.loads(body), 10)
        answer = service.answer(request, service.score([request]))
        offline = model.scorer.score(ROWS[3 * place : 3 * place + 3]).probabilities
        np.testing.assert_allclose(answer["probabilities"], offline, atol=1e-6)
        assert asked.difference(place, model.version, json.dumps(answer).encode()) < 1e-6
