import dataclasses
import json

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from core_gates.errors import GatesError
from recsys.model_folder import load_model, save_model
from recsys.ranker import Ranker
from recsys.table_scorer import read_model
from recsys.transform import FeatureTransform
from video_multitask.service.ranking_scorer import RankingScorer, RequestReader, loader, made_up
from video_multitask.service.serving_model import Models, scored


@pytest.fixture(scope="module")
def reader(shop):
    return RequestReader(shop.FeatureTransform(shop.schema()).fit(shop.rows(300)), shop.TASKS)


@pytest.fixture
def good(shop):
    return json.loads(json.dumps(shop.request(shop.rows(3))))


def test_fields_have_the_kinds_of_the_training_table(reader):
    assert reader.kinds == {
        "reader": "integer", "city": "text", "book": "integer", "author": "text",
        "hour": "integer", "age": "number", "price": "number", "last": "integers",
    }  # fmt: skip


def test_requests_become_the_rows_that_they_ask_for(shop, reader):
    tables = [shop.rows(n, seed) for n, seed in ((3, 0), (1, 1), (4, 2))]
    requests = [reader.read(json.loads(json.dumps(shop.request(t))), 10) for t in tables]
    expected = pl.concat([shop.as_table(table) for table in tables])
    found = reader.table(requests)
    newest = pl.col("last").list.tail(5)
    kinds = expected.select(found.columns).with_columns(pl.col("age").cast(pl.Float64), newest)
    assert_frame_equal(found, kinds)


def test_a_field_may_be_given_for_user_context_or_candidates(reader, good):
    other = json.loads(json.dumps(good))
    hour = other["context"].pop("hour")
    for candidate in other["candidates"]:
        candidate["hour"] = hour
    other["user"]["price"] = None
    for candidate in other["candidates"]:
        del candidate["price"]
    first, second = reader.read(good, 10), reader.read(other, 10)
    table = reader.table([first, second])
    columns = [c for c in table.columns if c != "price"]
    assert_frame_equal(table[:3].select(columns), table[3:].select(columns))
    assert table["price"][3:].null_count() == 3


def test_tasks_order_and_ignored_keys(reader, good):
    good["tasks"], good["best_first"] = ["return", "view"], True
    good["candidates"][0]["day"] = "2024-01-01"  # a key of the schema besides the features
    request = reader.read(good, 10)
    assert request.tasks == [2, 0]
    assert request.best_first
    assert reader.read({**good, "tasks": []}, 10).tasks == [0, 1, 2]


def test_events_that_no_history_keeps_are_dropped_at_once(reader, good):
    """They would be repeated for each candidate."""
    other = json.loads(json.dumps(good))
    other["user"]["last"] = [*range(100_000), 3, 1, 4, 1, 5]
    good["user"]["last"] = [3, 1, 4, 1, 5]
    first, second = reader.read(other, 10), reader.read(good, 10)
    assert first.fixed["last"] == [3, 1, 4, 1, 5]
    assert_frame_equal(reader.table([first]), reader.table([second]))


FAULTS = {
    "no mapping": (lambda r: [r], "the request is a list: expected a mapping"),
    "unknown part": (lambda r: r | {"users": {}}, "unknown field 'users': did you mean 'user'?"),
    "no candidates": (lambda r: r | {"candidates": []}, "expected a list of one mapping or more"),
    "candidates no list": (lambda r: r | {"candidates": {}}, "candidates: expected a list"),
    "too many": (lambda r: r | {"candidates": r["candidates"] * 4}, "has 12 rows, at most 10"),
    "user no mapping": (lambda r: r | {"user": 5}, "user is a number: expected a mapping"),
    "absent": (lambda r: r | {"context": {}}, "lacks 'hour', and so do user and context"),
    "twice": (
        lambda r: r | {"context": r["context"] | {"city": "Graz"}},
        "context.city is given twice",
    ),
    "twice in candidates": (
        lambda r: r | {"user": r["user"] | {"book": 3}},
        "candidates[0].book is given twice",
    ),
    "unknown column": (
        lambda r: r | {"user": r["user"] | {"citi": "Graz"}},
        "user.citi is no field of the model: did you mean 'city'?",
    ),
    "text id": (
        lambda r: r | {"user": r["user"] | {"reader": "7"}},
        "user.reader is '7': expected an integer or null",
    ),
    "fraction": (
        lambda r: r | {"user": r["user"] | {"reader": 7.5}},
        "user.reader is 7.5: expected an integer",
    ),
    "wrong event": (
        lambda r: r | {"user": r["user"] | {"last": [1, "x"]}},
        "user.last is [1, 'x']: expected a list of integers",
    ),
    "infinite": (
        lambda r: r | {"user": r["user"] | {"age": float("inf")}},
        "user.age is inf: expected a finite number",
    ),
    "unknown task": (lambda r: r | {"tasks": ["like"]}, "no task 'like'; it has view, buy, return"),
    "tasks no list": (lambda r: r | {"tasks": "view"}, "tasks: expected a list of names"),
    "order": (lambda r: r | {"best_first": 1}, "best_first: expected true or false"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_request_is_refused_by_field_and_row(reader, good, fault):
    change, words = FAULTS[fault]
    with pytest.raises(GatesError) as caught:
        reader.read(change(good), 10)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("video V14")
@pytest.mark.parametrize("tasks", ["", 0, 0.0, False, {}])
def test_only_null_stands_for_all_tasks(reader, good, tasks):
    assert reader.read({**good, "tasks": None}, 10).tasks == [0, 1, 2]
    with pytest.raises(GatesError, match="tasks: expected a list of names"):
        reader.read({**good, "tasks": tasks}, 10)


def test_rows_hold_known_values_in_every_field(shop):
    transform = shop.FeatureTransform(shop.schema()).fit(shop.rows(300))
    table = made_up(transform, 400)
    features = transform.encode(table)
    assert not (features.sparse < 2).any(0).any()
    assert (features.sequences[0] >= 2).any(1).mean() > 0.5
    assert np.unique(features.sparse, axis=0).shape[0] == 400
    assert made_up(transform, 400).equals(table)
    assert not made_up(transform, 400, seed=1).equals(table)
    assert set(table.columns) == set(RequestReader(transform, shop.TASKS).kinds)


EXPONENTS, OFFSETS = {"buy": 2.0, "return": -1.0}, {"return": 0.5}


@pytest.fixture(scope="module")
def scorer(model_folder):
    return loader(EXPONENTS, OFFSETS, "score")(model_folder)


def ask(scorer, *contents):
    """Answers to requests that are scored at once."""
    requests = [scorer.read(json.loads(json.dumps(content)), 1000) for content in contents]
    found = scored(scorer, requests)
    return [scorer.answer(r, part) for r, part in zip(requests, found, strict=True)]


def test_answers_are_those_of_the_table(shop, scorer):
    tables = [shop.rows(n, seed) for n, seed in ((7, 1), (1, 2), (20, 3))]
    answers = ask(scorer, *map(shop.request, tables))
    for table, answer in zip(tables, answers, strict=True):
        offline = scorer.tables.score(shop.as_table(table))
        np.testing.assert_allclose(answer["probabilities"], offline.probabilities, atol=1e-6)
        np.testing.assert_allclose(answer["scores"], scorer.fusion(offline.probabilities), 1e-5)
        assert answer["candidates"] == list(range(len(table)))
        assert (answer["tasks"], answer["model"]) == (list(shop.TASKS), scorer.version)
        counts = dict(zip(scorer.tables.sparse_names, offline.unknown.sum(0), strict=True))
        assert answer["unknown"] == {name: n for name, n in counts.items() if n}
    assert np.std(np.concatenate([a["probabilities"] for a in answers]), axis=0).min() > 0.01


@pytest.mark.parametrize("encoder", ["mean", "transformer", "target_attention"])
def test_what_is_of_a_user_is_encoded_once_for_all_candidates(shop, tmp_path, encoder, monkeypatch):
    scorer = loader(unknown="score")(shop.write_model(tmp_path / "model", encoder=encoder))
    ranker, seen = scorer.tables.ranker, []
    encode = ranker.user_inputs
    monkeypatch.setattr(ranker, "user_inputs", lambda rows: seen.append(len(rows)) or encode(rows))
    tables = [shop.rows(n, seed) for n, seed in ((7, 1), (1, 2), (20, 3))]
    answers = ask(scorer, *map(shop.request, tables))
    assert len(seen) == (0 if encoder == "mean" else 3)
    for table, answer in zip(tables, answers, strict=True):
        offline = scorer.tables.score(shop.as_table(table)).probabilities
        np.testing.assert_allclose(answer["probabilities"], offline, atol=1e-6)


def test_candidates_may_have_histories_that_differ(shop, tmp_path):
    scorer = loader(unknown="score")(shop.write_model(tmp_path / "model", encoder="transformer"))
    table = shop.rows(12, 4)
    content = shop.request(shop.as_table(table))
    del content["user"]["last"]
    for candidate, events in zip(content["candidates"], table["last"].to_list(), strict=True):
        candidate["last"] = events
    (answer,) = ask(scorer, content)
    offline = scorer.tables.score(shop.as_table(table).with_columns(table["last"])).probabilities
    np.testing.assert_allclose(answer["probabilities"], offline, atol=1e-6)


def test_the_best_come_first_with_the_wanted_tasks(shop, scorer):
    table = shop.rows(30, 4)
    plain, ordered = ask(
        scorer, shop.request(table), shop.request(table, best_first=True, tasks=["return"])
    )
    order = np.argsort(-np.array(plain["scores"]), kind="stable")
    assert (ordered["candidates"], ordered["tasks"]) == (order.tolist(), ["return"])
    expected = np.array(plain["probabilities"])[order][:, [2]]
    np.testing.assert_allclose(ordered["probabilities"], expected, atol=1e-6)
    np.testing.assert_allclose(ordered["scores"], np.array(plain["scores"])[order], atol=1e-6)
    assert ordered["scores"] == sorted(ordered["scores"], reverse=True)


def test_values_that_training_has_not_seen_are_counted_or_refused(shop, scorer, model_folder):
    table = shop.rows(6)
    content = shop.request(table)
    content["user"]["reader"] = 10**9
    content["candidates"][4]["book"] = 10**9
    (answer,) = ask(scorer, content)
    assert answer["unknown"] == {"reader": 6, "book": 1}
    strict = RankingScorer(read_model(model_folder))
    dropping = RankingScorer(read_model(model_folder), unknown="drop")
    for one in (strict, dropping):
        with pytest.raises(GatesError, match=r"user\.reader has a value that training has not"):
            ask(one, content)
    content["user"]["reader"] = table["reader"][0]
    (kept,) = ask(dropping, content)
    assert (kept["candidates"], kept["unknown"]) == ([0, 1, 2, 3, 5], {"book": 1})
    everyone = ask(scorer, content)[0]["probabilities"]
    assert kept["probabilities"] == [everyone[place] for place in kept["candidates"]]
    with pytest.raises(GatesError, match=r"candidates\[4\]\.book has a value"):
        ask(strict, content)
    content["candidates"].pop(4)
    assert "scores" not in ask(strict, content)[0]


@pytest.mark.fault("46 R4")
def test_numbers_outside_those_of_training_are_counted_and_not_refused(shop, scorer):
    content = shop.request(shop.rows(30))
    content["user"]["age"] = -5
    for candidate in content["candidates"]:
        candidate["price"] = 9.0
    content["candidates"][3]["price"], content["candidates"][4]["price"] = 97_300, None
    (answer,) = ask(scorer, content)
    assert len(answer["probabilities"]) == 30
    assert answer["numbers"] == {
        "age": {"outside": 1, "shifted": 0}, "price": {"outside": 1, "shifted": 0},
    }  # fmt: skip
    for candidate in content["candidates"]:
        candidate["price"] = 9000.0
    (answer,) = ask(scorer, content)
    assert answer["numbers"]["price"] == {"outside": 30, "shifted": 1}
    content["user"]["age"] = None
    for candidate in content["candidates"]:
        candidate["price"] = 9.0
    assert ask(scorer, content)[0]["numbers"] == {}


def test_without_a_score_nothing_is_best(shop, model_folder):
    plain = RankingScorer(read_model(model_folder))
    with pytest.raises(GatesError, match="has no fused score: leave it out, or serve with --fused"):
        ask(plain, shop.request(shop.rows(3), best_first=True))


def test_extreme_values_are_scored(shop, scorer):
    content = shop.request(shop.rows(2))
    content["user"] |= {"age": 1e300, "reader": -(2**63), "last": [2**63 - 1] * 3000, "city": ""}
    content["candidates"][0] |= {"price": -0.0, "author": "\x00" * 1000}
    (answer,) = ask(scorer, content)
    assert np.isfinite(answer["probabilities"]).all()


def test_a_model_warms_up_and_has_a_version_of_name_and_content(shop, scorer, tmp_path):
    scorer.warm_up()
    first = read_model(shop.write_model(tmp_path / "a"))
    other = read_model(shop.write_model(tmp_path / "b" / "a", seed=1))
    assert first.version.split()[0] == other.version.split()[0] == "a"
    assert first.version != other.version
    assert scorer.version.split()[1] == first.version.split()[1]  # equal content


def test_a_fusion_that_does_not_fit_the_model_is_refused(model_folder):
    with pytest.raises(GatesError, match="names like; the tasks are view, buy, return"):
        loader({"like": 1.0}, None, "score")(model_folder)


def diverged(shop, folder, factor):
    """A model whose weights are finite, but whose results are not."""
    loaded = load_model(shop.write_model(folder))
    with torch.no_grad():
        for weight in loaded.ranker.net.parameters():
            weight.mul_(factor)
    return save_model(folder, loaded.ranker, loaded.transform)


def test_a_model_that_gives_no_probabilities_is_not_put_into_service(shop, model_folder, tmp_path):
    folder = shop.write_model(tmp_path / "model")
    models = Models(folder, loader(unknown="score"))
    old = models.current
    diverged(shop, folder, 1e30)
    assert [models.look(), models.look()] == [False, False]
    assert models.current is old
    with pytest.raises(GatesError, match="gives a probability that is not finite: its training"):
        RankingScorer(read_model(folder)).warm_up()


def test_a_model_of_other_fields_or_tasks_is_not_swapped_in(shop, tmp_path, caplog):
    folder = shop.write_model(tmp_path / "model")
    models = Models(folder, loader(unknown="score"))
    old = models.current
    loaded = load_model(folder)
    schema = dataclasses.replace(
        loaded.transform.schema,
        tasks=loaded.transform.schema.tasks[:2],
        dense=loaded.transform.schema.dense[:1],
    )
    table = shop.rows(200).with_columns(hour=pl.col("hour").cast(pl.String) + "h")
    transform = FeatureTransform(schema).fit(table)
    sizes = (transform.sizes, transform.dense_width)
    net = {"hidden_dims": [4], "tower_dims": [4]}
    save_model(folder, Ranker.build(schema, *sizes, "SharedBottom", net), transform)
    assert [models.look(), models.look()] == [False, False]
    assert models.current is old
    for words in (
        "it lacks the field 'price'",
        "it lacks the task 'return'",
        "it has the field 'hour', text instead of integer",
    ):
        assert words in caplog.text
    shop.write_model(folder, seed=1)
    assert [models.look(), models.look()] == [False, True]
