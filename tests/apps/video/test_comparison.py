"""A contest in a run: what is trained, found again, pooled and refused."""

import json
import re
import shutil
from contextlib import contextmanager
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from apps.video.comparison import CPU, Comparison
from apps.video.comparison import train as comparison_train
from apps.video.comparison import trial as comparison_trial
from apps.video.report import _experts
from core_gates import GatesError
from harness.experiment import Arrays, Figures, Job, Run, SettingsDiffer, read_scores
from harness.report.sections import found_choices
from harness.runs.terminal import quiet_lightning
from recsys import MultiTaskModule
from recsys.baselines import Trees, WithIntercepts
from recsys.data.tables import table_digest
from recsys.experiments import (
    ORACLE,
    SUMMED,
    Claims,
    Contest,
    Fold,
    data_of,
    folds_of,
    from_settings,
    module_of,
    probabilities,
    ranker_of,
    summed_log_loss_of,
)

SOURCE = "data.source.init_args."
SETTINGS = {
    "seed": 0,
    "model.net": "HoME",
    "model.options.dim": 4,
    "model.options.hidden_dims": [6],
    "model.options.rank": [2, 2],
    "model.options.tower_dims": [3],
    "model.learning_rate": 0.01,
    "data.source.class_path": "video_multitask.sources.simulated.SimulatedFeed",
    f"{SOURCE}rows": 900,
    f"{SOURCE}users": 30,
    f"{SOURCE}videos": 50,
    f"{SOURCE}days": 4,
    f"{SOURCE}validation_days": 1,
    f"{SOURCE}test_days": 1,
    f"{SOURCE}dim": 2,
    "data.batch_size": 150,
    "trainer.max_epochs": 1,
}
MMOE = {"num_experts": 3, "dim": 4, "hidden_dims": [6], "tower_dims": [3]}
CONTEST = {
    "methods": {"home": {"net": "HoME"}, "mmoe": {"net": "MMoE", "options": MMOE}},
    "space": {"model.learning_rate": [1e-3, 1e-1]},
    "trials": 2,
    "configured_first": True,
    "baselines": {"duration": {"kind": "one_column", "column": "duration_ms"}},
}
WHOLE = (Fold(),)
CLAIMS = Claims(beats=("duration",), bounded=True, calibrated=True)


@pytest.fixture(autouse=True)
def _one_thread():
    """Pieces are made in this process, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def comparison(folder, *, seeds=(0, 1), folds=WHOLE, averaged=False, contest=CONTEST, **run):
    made = Run(folder, app="video", settings={**SETTINGS, **run.pop("settings", {})}, **run)
    return Comparison(made, Contest(**contest), seeds, folds, averaged=averaged)


def plain(**changes):
    """The contest without tuning."""
    return {**CONTEST, "space": {}, **changes}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a whole evaluation; not to be changed."""
    folder = tmp_path_factory.mktemp("contest") / "unit"
    torch.set_num_threads(1)
    comparison(folder).finish(CLAIMS, experts=True)
    return folder


@contextmanager
def unchanged(folder):
    """Nothing but scores may be written inside the block."""
    before = state(folder)
    yield
    assert state(folder) == before


def state(folder):
    return {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "scores" not in p.name
    }


def made(folder, before):
    """Kind and piece of every result that was made since."""
    changed = {p for p, time in state(folder).items() if before.get(p) != time}
    return {f"{p.parents[1].name}/{p.parent.name}" for p in changed}


def rows_of(folder):
    return read_scores(folder / "scores.json", "video").rows


def summed(folder):
    return {r.method: r.value for r in rows_of(folder) if r.metric == SUMMED and not r.versus}


def test_all_are_scored_on_the_same_rows_between_chance_and_the_oracle(done):
    found = comparison(done)
    test, scores = found.test(), summed(done)
    assert list(scores) == ["home", "mmoe", "duration", ORACLE]
    truth = found.data(Fold()).table("test").select(f"truth_{t}" for t in found.tasks()).to_numpy()
    assert scores[ORACLE] == pytest.approx(summed_log_loss_of(test, truth), rel=1e-6)
    assert scores[ORACLE] == min(scores.values())
    rows = rows_of(done)
    users = len(np.unique(test.user.numpy()))
    assert {r.n for r in rows if r.metric == SUMMED} == {users}
    differences = [r for r in rows if r.versus]
    assert {(r.method, r.versus) for r in differences} == {
        (m, "home") for m in ("mmoe", "duration", ORACLE)
    }
    for method in ("mmoe", "duration", ORACLE):
        gap = pytest.approx(scores[method] - scores["home"], abs=1e-9)
        own = {r.metric: r.value for r in differences if r.method == method}
        assert (own.pop(SUMMED), own.keys()) == (gap, {f"{SUMMED} watch", f"{SUMMED} inter"})
        assert sum(own.values()) == gap
    assert {r.task for r in rows if r.method == "mmoe" and r.metric == "auc"} == set(found.tasks())
    assert {"home", "mmoe"} == {r.method for r in rows if r.task == "experts"}


def test_a_network_that_was_kept_predicts_what_was_scored(done):
    found = comparison(done)
    chosen = found.chosen()
    (pieces,) = found.networks(chosen)
    assert [piece.name for piece in pieces] == ["home-s0", "home-s1", "mmoe-s0", "mmoe-s1"]
    test, store = found.test(), found.run.store("weights", Arrays())
    predicted = found.predictions(chosen)
    for method in ("home", "mmoe"):
        own = [piece for piece in pieces if piece.method == method]
        data = found.data_of(own[0].settings)
        each = [probabilities(ranker_of(p.settings, store.load(p), data), test) for p in own]
        assert not np.array_equal(*each)
        np.testing.assert_array_equal(predicted[method], each)
        mean = np.mean([summed_log_loss_of(test, one) for one in each])
        assert summed(done)[method] == pytest.approx(mean, rel=1e-9)
        trials = found.run.store("choices", Figures()).load(
            found.run.piece(method, 100, **found.own(Fold())[method],
                            space=found.contest.boxes()[method], trials=2,
                            plain={"model.learning_rate": 0.01})
        )["trials"]  # fmt: skip
        assert trials[0]["model.learning_rate"] == 0.01
        best = min(trials, key=lambda trial: trial["score"])
        assert {piece["model.learning_rate"] for piece in own} == {best["model.learning_rate"]}
        assert len({trial["score"] for trial in trials}) == 2


def test_pieces_are_found_again(done, capsys):
    scores = rows_of(done)
    with unchanged(done):
        comparison(done).finish(CLAIMS, experts=True)
    assert "missing" not in capsys.readouterr().out
    assert rows_of(done) == scores


def test_the_report_shows_the_shipped_choice_of_every_method(done, tmp_path, monkeypatch):
    (tmp_path / "weights/default").mkdir(parents=True)
    shutil.copytree(done / "choices", tmp_path / "weights/default/choices")
    monkeypatch.setattr("harness.experiment.run.files", lambda _: tmp_path)
    found = comparison(tmp_path / "run", package="video_multitask")
    assert list(found_choices(found.run, found.own_of_all())) == ["home", "mmoe"]


def test_a_method_is_made_again_when_its_own_options_change(done, tmp_path, capsys):
    folder = copied(done, tmp_path)
    changed = {**CONTEST["methods"], "mmoe": {"net": "MMoE", "options": {**MMOE, "num_experts": 4}}}
    contest = {**CONTEST, "methods": changed}
    with unchanged(folder), pytest.raises(SettingsDiffer, match=r"mmoe.*model\.options"):
        comparison(folder, contest=contest).finish(CLAIMS)
    before = state(folder)
    comparison(folder, contest=contest, overwrite=True).finish(CLAIMS)
    names = {f"trials/mmoe-trial{n}-s100" for n in (0, 1)} | {"choices/mmoe-s100"}
    assert made(folder, before) == names | {"weights/mmoe-s0", "weights/mmoe-s1"}
    before = state(folder)
    baselines = {"duration": {**CONTEST["baselines"]["duration"], "bins": 9}}
    contest |= {"baselines": baselines}
    comparison(folder, contest=contest, overwrite=True).finish(CLAIMS)
    assert made(folder, before) == {"baselines/duration"}


def test_a_setting_of_all_networks_leaves_baselines(done, tmp_path):
    folder = copied(done, tmp_path)
    before = state(folder)
    changed = {"model.embedding_learning_rate": 0.1}
    comparison(folder, contest=plain(), settings=changed, overwrite=True).finish(CLAIMS)
    assert made(folder, before) == {f"weights/{m}-s{s}" for m in ("home", "mmoe") for s in (0, 1)}


@pytest.mark.fault("video V20")
def test_baselines_get_the_intercepts_that_networks_get(done, tmp_path):
    """From validation rows, in trials as in the fit, and only where networks have them."""
    few = {
        "kind": "trees",
        "max_iter": 5,
        "learning_rate": 0.1,
        "space": {"learning_rate": [0.02, 0.3]},
    }
    contest = plain(methods={"home": {"net": "HoME"}}, baselines={"trees": few})
    found = comparison(
        tmp_path / "with", contest=contest, settings={"model.intercepts": "validation"}, seeds=(0,)
    )
    chosen = found.chosen()
    data, rate = found.data(Fold()), chosen["trees"].setting["baseline.learning_rate"]
    made = WithIntercepts(Trees(max_iter=5, learning_rate=rate))
    made.fit(data.batch("train"), data.batch("validation"))
    wanted = made.predict(data.batch("test"))
    np.testing.assert_allclose(found.predictions(chosen)["trees"][0], wanted, atol=1e-6)
    own = summed_log_loss_of(data.batch("validation"), made.predict(data.batch("validation")))
    assert min(trial["score"] for trial in chosen["trees"].trials) == pytest.approx(own, rel=1e-9)
    without = comparison(tmp_path / "without", contest=contest)
    assert without.own_of_all()["trees"].get("model.intercepts", None) is None
    record = json.loads((done / "baselines" / "duration" / "record.json").read_text())
    assert "model.intercepts" not in record["settings"]
    record = json.loads((tmp_path / "with/baselines/trees/record.json").read_text())
    assert record["settings"]["model.intercepts"] == "validation"


@pytest.mark.fault("video V15")
def test_a_method_with_data_of_its_own_is_sized_for_its_columns(tmp_path):
    """Embeddings of another width: the network that is trained has the size of the reference."""
    wide = {"net": "MMoE", "options": MMOE, "settings": {f"{SOURCE}dim": 8}}
    methods = {**CONTEST["methods"], "mmoe_wide": wide}
    found = comparison(tmp_path / "sizes", contest=plain(methods=methods))
    sizes = {}
    for method, own in found.own(Fold()).items():
        data = found.data_of({**found.run.settings, **own})
        ranker = module_of(found.run.piece(method, **own).settings).build(data.transform)
        sizes[method] = sum(weight.numel() for weight in ranker.net.parameters())
    assert sizes["mmoe"] == pytest.approx(sizes["home"], rel=0.05)
    assert sizes["mmoe_wide"] == pytest.approx(sizes["home"], rel=0.05)
    own = found.own(Fold())
    assert own["mmoe_wide"]["model.options"] != own["mmoe"]["model.options"]
    reference = {"net": "HoME", "settings": {f"{SOURCE}dim": 8}}
    swapped = comparison(
        tmp_path / "swapped", contest=plain(methods={**methods, "home": reference})
    )
    assert swapped.own(Fold())["mmoe"]["model.options"] != own["mmoe"]["model.options"]
    without = comparison(tmp_path / "without", contest=plain()).own(Fold())
    assert without == {m: own[m] for m in without}  # the others are what they were


def copied(done, tmp_path):
    return shutil.copytree(done, tmp_path / "copy")


def test_a_quick_run_trains_nothing(tmp_path, capsys):
    comparison(tmp_path / "quick", quick=True).finish(CLAIMS, experts=True)
    assert not (tmp_path / "quick" / "weights").exists()
    assert set(summed(tmp_path / "quick")) == {"duration", ORACLE}
    out = capsys.readouterr().out
    assert "never tuned: home, mmoe; what is plain, or else the middle" in out
    assert "leaving out 4 missing networks: " in out
    found = read_scores(tmp_path / "quick" / "scores.json", "video")
    assert found.quick
    assert found.bars == []


@pytest.mark.fault("video V1")
def test_a_whole_evaluation_follows_a_quick_one_that_tuned_nothing(tmp_path):
    factorization = {"kind": "factorization", "learning_rate": 0.1}
    factorization["space"] = {"learning_rate": [0.02, 0.5]}
    given = plain(methods={"home": {"net": "HoME"}}, baselines={"fm": factorization}, trials=3)
    comparison(tmp_path, contest=given, quick=True).finish(Claims())
    quick = summed(tmp_path)["fm"]
    comparison(tmp_path, contest=given, seeds=(0,)).finish(Claims())
    assert summed(tmp_path)["fm"] != quick
    assert {path.name for path in (tmp_path / "baselines").iterdir()} == {"fm", "fm@untuned"}


FOLDS = folds_of(f"{SOURCE}seed", [3, 4, 3], SETTINGS)


def test_folds_are_pooled_and_seeds_averaged(tmp_path):
    """Two worlds: their test rows one after the other, each predicted by its own network."""
    assert [fold.keys for fold in FOLDS] == [{"f": 3}, {"f": 4}]
    contest = plain(methods={"home": {"net": "HoME"}})
    found = comparison(tmp_path / "f", folds=FOLDS, averaged=True, seeds=(0, 1, 0), contest=contest)
    predicted, test = found.predictions({}), found.test()
    assert set(predicted) == {"home", "home, averaged", "duration", ORACLE}
    assert [len(own) for own in predicted.values()] == [2, 1, 1, 1]
    parts = [found.data(fold) for fold in FOLDS]
    assert len(test) == sum(len(part.table("test")) for part in parts)
    assert not parts[0].table("test").equals(parts[1].table("test"))
    np.testing.assert_array_equal(predicted["home, averaged"][0], np.mean(predicted["home"], 0))
    names = [[piece.name for piece in some] for some in found.networks({})]
    assert names == [[f"home-f{fold}-s{seed}" for seed in (0, 1)] for fold in (3, 4)]
    first = len(parts[0].table("test"))
    store = found.run.store("weights", Arrays())
    piece = found.networks({})[1][1]
    own = probabilities(
        ranker_of(piece.settings, store.load(piece), parts[1]), parts[1].batch("test")
    )
    np.testing.assert_array_equal(predicted["home"][1][first:], own)
    truth = parts[1].table("test")["truth_like"].to_numpy()
    np.testing.assert_array_equal(predicted[ORACLE][0][first:, found.tasks().index("like")], truth)
    found.finish(Claims())
    scores = summed(tmp_path / "f")
    assert scores["home, averaged"] <= scores["home"]  # log-loss is convex
    # A quick run that finds a network on one fold only cannot pool it.
    gone = tmp_path / "f" / "weights" / "home-f4-s1"
    (gone / "record.json").unlink()
    (gone / "result.safetensors").unlink()
    gone.rmdir()
    (tmp_path / "f" / "scores.json").unlink()
    part = comparison(tmp_path / "f", folds=FOLDS, contest=contest, quick=True)
    left = part.predictions({})
    assert [len(own) for own in left.values()] == [1, 1, 1]
    np.testing.assert_array_equal(left["home"][0], predicted["home"][0])


@pytest.mark.fault("video V16")
def test_users_of_two_worlds_are_two_although_they_have_one_number(tmp_path):
    found = comparison(
        tmp_path / "f", folds=FOLDS, contest=plain(methods={"home": {"net": "HoME"}})
    )
    each = [found.data(fold).batch("test").user for fold in FOLDS]
    assert set(each[0].tolist()) & set(each[1].tolist())
    users = found.test().user
    assert len(users.unique()) == sum(len(one.unique()) for one in each)
    first = len(each[0])
    for own, pooled in zip(each, (users[:first], users[first:]), strict=True):
        pairs = set(zip(own.tolist(), pooled.tolist(), strict=True))
        assert len(pairs) == len(own.unique())  # one number for each user
    wider = folds_of(f"{SOURCE}test_days", [1, 2], SETTINGS)  # days of one world
    shared = comparison(tmp_path / "d", folds=wider, contest=plain())
    assert len(shared.test().user.unique()) <= SETTINGS[f"{SOURCE}users"]


@pytest.mark.fault("video H7")
def test_folds_with_the_same_test_rows_are_refused(tmp_path):
    with pytest.raises(GatesError, match=r"is no setting of the data \(did you mean .*seed\?"):
        folds_of(f"{SOURCE}sede", [0, 1], SETTINGS)
    same = folds_of("data.batch_size", [100, 150], SETTINGS)
    with pytest.raises(GatesError, match="--folds 100 and 150 have the same test rows"):
        comparison(tmp_path / "f", folds=same, contest=plain()).finish(Claims())
    assert not (tmp_path / "f").exists()


@pytest.fixture
def table(tmp_path):
    draw = np.random.default_rng(0)
    columns = {"c": draw.integers(0, 9, 900), "u": draw.integers(0, 40, 900)}
    columns["y"] = (draw.random(900) < 0.2 + 0.06 * columns["c"]).astype(int)
    path = tmp_path / "own.csv"
    pl.DataFrame(columns).write_csv(path)
    gone = dict.fromkeys(name for name in SETTINGS if name.startswith("data.source"))
    return {
        **gone,
        "data.source.class_path": "recsys.data.readers.own_table.OwnTable",
        f"{SOURCE}path": str(path),
        f"{SOURCE}labels": ["y"],
        f"{SOURCE}user": "u",
    }


def test_a_table_of_ones_own_has_no_oracle(table, tmp_path):
    contest = plain(methods={"home": {"net": "HoME"}}, baselines={"rates": {"kind": "base_rates"}})
    found = comparison(tmp_path / "own", contest=contest, settings=table, seeds=(0,))
    found.finish(Claims(bounded=True))
    assert set(summed(tmp_path / "own")) == {"home", "rates"}
    (bar,) = read_scores(tmp_path / "own" / "scores.json", "video").bars
    assert np.isnan(bar.value)
    assert not bar.met


@pytest.mark.fault("video V16")
@pytest.mark.parametrize("user", ["u", ""])
def test_folds_share_the_users_of_a_column_but_no_row_numbers(user, table, tmp_path):
    settings = {**table, f"{SOURCE}user": user, f"{SOURCE}split": "row"}
    folds = folds_of(f"{SOURCE}test", [0.1, 0.3], settings)
    contest = plain(methods={"home": {"net": "HoME"}}, baselines={})
    found = comparison(tmp_path / "own", contest=contest, settings=settings, folds=folds)
    parts = [found.data(fold).table("test") for fold in folds]
    if user:
        distinct = len(np.unique(np.concatenate([part["u"].to_numpy() for part in parts])))
        assert distinct <= 40
    else:
        distinct = sum(map(len, parts))
    assert len(found.test().user.unique()) == distinct


def test_weights_that_saw_the_test_rows_are_refused(table, tmp_path):
    contest = plain(methods={"home": {"net": "HoME"}}, baselines={})
    found = comparison(tmp_path / "own", contest=contest, settings=table, seeds=(0,))
    (pieces,) = found.networks({})
    store = found.run.store("weights", Arrays())
    assert store.record(pieces[0]).objects == found.data(Fold()).training_objects()
    tested = table_digest(found.data(Fold()).table("test"))[:12]
    store.keep(pieces[0], store.load(pieces[0]), objects=["0", tested])
    with pytest.raises(GatesError, match="home-s0 was trained on 1 of the 1 objects that it is"):
        found.predictions({})


def test_what_a_reader_must_know_of_weights_is_noted(done, tmp_path):
    def notes():
        return " ".join(read_scores(folder / "scores.json", "video").notes)

    folder = copied(done, tmp_path)
    assert "rounded" not in notes()
    assert "another hash" not in notes()
    for path in folder.glob("weights/*/record.json"):
        record = json.loads(path.read_text())
        record["facts"]["rounded"] = "int8"
        record["objects"] = ["0" * 12]
        path.write_text(json.dumps(record))
    comparison(folder).finish(CLAIMS)
    assert "rounded to int8" in notes()
    assert "trained on rows with another hash" in notes()


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    space = {"model.learning_rate": [1e-2, 1e30]}
    contest = {**CONTEST, "space": space, "methods": {"home": {"net": "HoME"}}, "baselines": {}}
    contest["configured_first"] = False
    choice = comparison(tmp_path / "d", contest=contest, seeds=(0,)).chosen()["home"]
    assert None in [trial["score"] for trial in choice.trials]  # NaN in JSON
    assert choice.setting["model.learning_rate"] == min(
        t["model.learning_rate"] for t in choice.trials
    )
    away = comparison(tmp_path / "e", contest=plain(), settings={"model.learning_rate": 1e30})
    with pytest.raises(GatesError, match=r"^(home|mmoe)-s\d: .*training has diverged: lower"):
        away.networks({})


def test_margins_cost_and_caps_of_play_time_and_its_rivals(tmp_path):
    """The network with the head, the same without it, and a linear model of play time."""
    play = {f"{SOURCE}play_time": True}
    methods = {
        "home": {"net": "HoME"},
        "home_play_time": {"net": "HoME", "sized": False, "settings": play},
        "linear_play_time": {"net": "Linear", "sized": False, "settings": play},
    }
    margins = {"best - duration": 9.0, "home_play_time - home": 0.0, "linear_play_time - gone": 1.0}
    given = plain(methods=methods)
    with pytest.raises(GatesError, match="claims name 'gone', not a method"):
        comparison(tmp_path / "x", contest=given, seeds=(0,)).finish(Claims(margins=margins))
    del margins["linear_play_time - gone"]
    made = comparison(tmp_path / "x", contest=given, seeds=(0, 1))
    made.finish(Claims(margins=margins))
    pieces, drawn = made.pieces({})[0], []
    page = SimpleNamespace(section=drawn.append, text=drawn.append, figure=lambda *_, **__: None)
    _experts(page, made, pieces, pieces[0])  # of the networks that have gates for their tasks
    assert drawn[0] == "Experts"
    _experts(page, made, pieces, next(p for p in pieces if p.method == "home_play_time"))
    assert drawn.count("Experts") == 1
    found = read_scores(tmp_path / "x" / "scores.json", "video")
    losses = summed(tmp_path / "x")
    best = min(("home", "home_play_time"), key=losses.__getitem__)
    first, second, third = found.bars
    assert first.name == f"summed log-loss of {best} - duration"
    assert first.value == pytest.approx(losses[best] - losses["duration"])
    assert second.value == pytest.approx(losses["home_play_time"] - losses["home"])
    assert (third.name, third.bar) == (f"{second.name}, upper end", 0.0)
    assert third.value > second.value
    rows = {(r.method, r.metric): r.value for r in found.rows if r.task in ("test", "play_time")}
    for method in ("home_play_time", "linear_play_time"):
        assert 0.4 < rows[method, "xauc"] < 1
        assert rows[method, "mae"] > 0
    assert ("home", "xauc") not in rows
    assert all(rows[method, "CPU seconds of training"] >= 0 for method in (*methods, "duration"))
    assert "home-s0 was ended by the cap of epochs" in found.notes


def test_a_trial_of_two_seeds_is_the_mean_of_both(tmp_path):
    given = {**CONTEST, "methods": {"home": {"net": "HoME"}}}
    twice = comparison(tmp_path / "two", contest={**given, "trial_seeds": 2}, seeds=(0,))
    chosen = twice.chosen()["home"]
    (own,), losses = twice.own(WHOLE[0]).values(), []
    trial = dict(chosen.trials[0])
    score = trial.pop("score")
    for seed in (100, 101):
        piece = twice.run.piece("home", seed, **own, **trial)
        weights = twice.run.store("w", Arrays())
        twice.run.obtain(weights, [piece], twice._work(comparison_train))
        data = twice.data(WHOLE[0])
        ranker = ranker_of(piece.settings, weights.load(piece), data)
        rows = data.batch("validation")
        losses.append(summed_log_loss_of(rows, probabilities(ranker, rows)))
    assert score == pytest.approx(np.mean(losses), abs=1e-9)


def test_networks_that_start_from_a_trained_linear(tmp_path):
    """With a second training that moves nothing they predict what the linear model did."""
    play = {f"{SOURCE}play_time": True, f"{SOURCE}products": True}
    still = {"model.learning_rate": 1e-12, "model.embedding_learning_rate": 1e-12}
    start = {"model.learning_rate": 0.01, "model.embedding_learning_rate": 0.1}
    deep = {"deep": "MMoE", "deep_options": MMOE}
    methods = {
        "home": {"net": "HoME"},
        "linear": {"net": "Linear", "sized": False, "settings": {**play, **start}},
        "again": {"net": "Linear", "sized": False, "settings": {**play, **still}, "start": start},
        "on_linear": {
            "net": "WideAndDeep", "options": deep, "sized": False,
            "settings": {**play, **still}, "start": start,
        },
        "moved": {
            "net": "WideAndDeep", "options": deep, "sized": False,
            "settings": {**play, **start}, "start": start,
        },
    }  # fmt: skip
    made = comparison(tmp_path / "x", contest=plain(methods=methods), seeds=(0,))
    found = made.predictions({})
    for method in ("again", "on_linear"):
        np.testing.assert_allclose(found[method][0], found["linear"][0], rtol=0, atol=2e-3)
    assert np.abs(found["moved"][0] - found["linear"][0]).max() > 0.01
    facts = {p.method: p.settings.get("start") for p in made.pieces({})[0]}
    assert facts["again"] == {"model.net": "Linear", "model.options": {}, **start}
    assert facts["home"] is None


def test_a_training_that_is_stopped_in_its_second_part_ends_with_the_same_bits(tmp_path):
    """The first part is there by then; also with trials of two seeds."""
    start = {"model.learning_rate": 0.01, "model.embedding_learning_rate": 0.1}
    deep = {"deep": "MMoE", "deep_options": MMOE}
    entry = {"net": "WideAndDeep", "options": deep, "sized": False, "start": start}
    methods = {"home": {"net": "HoME"}, "wide": entry}
    made = comparison(tmp_path, contest=plain(methods=methods), seeds=(0,))
    piece = made.pieces({})[0][1]
    whole = comparison_train(piece, Job(tmp_path / "whole"), {})
    for work in (comparison_train, comparison_trial):
        ticks = iter(range(9))

        def stop(ticks=ticks):
            if next(ticks) == 1:
                raise OSError("stopped")

        folder = tmp_path / work.__name__
        twice = piece if work is comparison_train else made.run.piece(
            "wide", 0, **{**made.own(WHOLE[0])["wide"], "trial_seeds": 2}
        )  # fmt: skip
        with pytest.raises(OSError, match="stopped"):
            work(twice, Job(folder, stop), {})
        assert (folder / "fit0" / "done").is_file()
        assert not (folder / "fit1" / "done").exists()
        again = work(twice, Job(folder), {})
        if work is comparison_train:
            assert whole.keys() == again.keys()
            assert all(torch.equal(whole[name], again[name]) for name in whole)
        else:
            assert again == work(twice, Job(tmp_path / "trial"), {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"net": "MMoE", "start": {}}, "net of 'other', which has a start"),
        ({"net": "Linear", "start": {"rate": 1}}, "start of method 'other' sets rate"),
        ({"net": "Linear", "start": {"data.batch_size": 9}}, "known are model.learning_rate"),
        ({"net": "Linear", "settings": {"model.start": "x"}}, "method 'other' sets 'model.start'"),
        ({"net": "Linear", "start": [1]}, "start of method 'other' are"),
        (
            {"net": "Linear", "start": {"model.net": "HoME"}},
            "start of method 'other' sets model.net",
        ),
        ({"net": "Linear", "sized": False, "start": {"model.ema": 2}}, "other: model"),
    ],
)
def test_wrong_starts_are_refused_before_anything_is_made(entry, message, tmp_path):
    methods = {"home": {"net": "HoME"}, "other": entry}
    with pytest.raises((GatesError, ValueError), match=message):
        comparison(tmp_path / "x", contest=plain(methods=methods)).finish(CLAIMS)
    assert not (tmp_path / "x" / "weights").exists()


@pytest.mark.fault("46 R7")
def test_a_contest_tells_its_cost_before_the_first_training_and_once(tmp_path, capsys):
    folder = tmp_path / "cost"
    comparison(folder, seeds=(0,), contest=plain()).finish(Claims())
    said = capsys.readouterr().out
    epochs = SETTINGS["trainer.max_epochs"]
    line = rf"at most 2 training runs of {epochs} epochs, about (\S+) CPU minutes if none ends"
    (minutes,) = re.findall(line, said)
    assert said.index("at most 2 training runs") < said.index("training networks")
    spent = [r.value for r in rows_of(folder) if r.metric == CPU and r.method in ("home", "mmoe")]
    assert sum(spent) / 8 < 60 * float(minutes) < 8 * max(sum(spent), 0.5)
    comparison(folder, seeds=(0,), contest=plain()).finish(Claims())
    assert "at most" not in capsys.readouterr().out


@pytest.mark.fault("46 R7")
def test_an_epoch_is_all_steps_and_a_validation(monkeypatch):
    """By a clock that the work itself turns: a step takes 1 s, a batch of validation 100 s."""
    quiet_lightning()
    spent = 0.0

    def turn(name, seconds):
        work = getattr(MultiTaskModule, name)

        def step(module, *args):
            nonlocal spent
            spent += seconds
            return work(module, *args)

        monkeypatch.setattr(MultiTaskModule, name, step)

    turn("training_step", 1.0)
    turn("validation_step", 100.0)
    monkeypatch.setattr(from_settings, "process_time", lambda: spent)
    data = data_of(SETTINGS)
    expected = len(data.train_dataloader()) + 100 * len(data.val_dataloader())
    assert from_settings.epoch_seconds(SETTINGS, data) == expected


@pytest.mark.fault("46 R7")
def test_the_contest_of_an_own_table_is_three_networks_with_four_trials():
    path = files("apps.video") / "configs" / "table.yaml"
    content = yaml.safe_load(path.read_text())["contest"]
    assert [one["net"] for one in content["methods"].values()] == ["HoME", "Linear", "SharedBottom"]
    runs = len(content["methods"]) * (content["trials"] * content.get("trial_seeds", 1) + 3)
    assert (content["trials"], runs) == (4, 21)
