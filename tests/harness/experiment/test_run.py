"""Results are made once, found again, and never taken for others."""

import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core_gates import GatesError
from harness.evidence import Bar, Row
from harness.experiment import Arrays, Figures, Job, Piece, Run, SettingsDiffer, Store, Table
from harness.experiment.scores import read_scores
from harness.experiment.ship import main as ship
from harness.experiment.ship import portable
from harness.experiment.ship import ship as ship_results
from harness.experiment.store import cast
from harness.files import Data, sha256
from harness.files.piece import read_record
from harness.files.rounding import in_8_bits

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def work(monkeypatch):
    """The module of work, importable here and in other processes."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    import work

    return work


@pytest.fixture
def run(tmp_path):
    return Run(
        tmp_path / "runs" / "toy" / "a", app="toy", settings={"model.dim": 8, "data.n": None}
    )


def logged(path):
    return [line.split()[0] for line in path.read_text().splitlines()] if path.is_file() else []


def test_absent_equals_null_and_order_does_not_matter(refuses):
    one = Piece("a", 0, {"n": 5}, {"x": 1, "y": None, "z": (1, 2)})
    two = Piece("a", 0, {"n": 5}, {"z": [1, 2], "x": 1})
    assert (one, hash(one), one.name) == (two, hash(two), "a-n5-s0")
    assert one != Piece("a", 1, {"n": 5}, {"x": 1, "z": [1, 2]})
    assert one != Piece("a", 0, {"n": 6}, {"x": 1, "z": [1, 2]})
    assert Piece("oi", keys={"task-": "0.1/error"}).name == "oi-task-0.1_error"
    refuses(KeyError, ("no setting 'epochs', only x, z", lambda: one["epochs"]))


def test_what_is_there_is_not_made_again(run, work, tmp_path, capsys):
    log = tmp_path / "log"
    store = run.store("squares", Figures())
    pieces = [run.piece("square", seed, log=str(log)) for seed in range(3)]
    assert run.obtain(store, pieces[:2], work.square) == pieces[:2]
    assert run.obtain(store, [*pieces, pieces[0]], work.square) == pieces
    assert sorted(logged(log)) == ["square-s0", "square-s1", "square-s2"]
    assert "making 1 missing square of 3: square-s2\n" in capsys.readouterr().out
    assert [store.load(piece)["score"] for piece in pieces] == [0.0, 1.0, 4.0]
    record = store.record(pieces[1])
    assert (record.settings["model.dim"], list(record.objects)) == (8, ["object1"])
    assert (record.facts, record.origin) == ({"note": "squared"}, "trained")
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".")] == []


def test_what_a_kill_at_the_last_moment_left_is_swept(run, work):
    """Killed after the result was whole, but before its folder of work was gone."""
    store, piece = run.store("squares", Figures()), run.piece("square", 1)
    run.obtain(store, [piece], work.square)
    left = store.folder / ".square-s1.partial"
    left.mkdir()
    (left / "last.ckpt").touch()
    (store.folder / ".square-s1.lock").touch()
    run.obtain(store, [piece], work.square)
    assert [path.name for path in store.folder.iterdir()] == ["square-s1"]


def test_what_ships_is_found_next_to_a_result_of_other_settings(refuses, tmp_path):
    package, own = tmp_path / "package", tmp_path / "run"
    piece, other, third = (Piece("square", 1, {}, {"rate": rate}) for rate in (0.1, 0.2, 0.3))
    shipped = Store("squares", Figures(), package).keep(piece, {"score": 1.0})
    store = Store("squares", Figures(), own, package)
    mine = store.keep(other, {"score": 2.0})
    assert (store.find(piece), store.find(other)) == (shipped, mine)
    assert (store.load(piece)["score"], store.load(other)["score"]) == (1.0, 2.0)
    assert not store.holds(piece)
    refuses(SettingsDiffer, (r"rate 0\.2, now 0\.3", lambda: store.find(third)))


@pytest.mark.fault("endoscopy A1")
def test_results_of_other_settings_are_refused_by_name(run, work):
    store = run.store("squares", Figures())
    run.obtain(store, [run.piece("square", 1, rate=0.1)], work.square)
    other = run.piece("square", 1, rate=0.2)
    with pytest.raises(SettingsDiffer, match=r"rate 0\.1, now 0\.2.*--name NEW.*--overwrite"):
        store.missing([other])
    again = Run(run.folder, app="toy", settings=run.settings, overwrite=True)
    fresh = again.store("squares", Figures())
    assert fresh.missing([other]) == [other]
    again.obtain(fresh, [other], work.square)
    assert fresh.record(other).settings["rate"] == 0.2


def test_a_package_result_of_other_settings_is_passed_over(tmp_path, work):
    package = tmp_path / "package"
    one, two = (
        Piece("square", 1, settings={"rate": 0.1}),
        Piece("square", 1, settings={"rate": 0.2}),
    )
    Store("squares", Figures(), package).keep(one, {"score": 7.0})
    store = Store("squares", Figures(), tmp_path / "run", package)
    assert store.load(one)["score"] == 7.0
    assert store.find(two) is None
    assert "rate 0.1, now 0.2" in store.reasons([two])[0]
    assert Store("squares", Figures(), tmp_path / "run", None).find(one) is None


def test_a_result_is_never_tested_on_what_it_was_trained_on(run, work):
    store = run.store("squares", Figures())
    piece = run.piece("square", 1)
    run.obtain(store, [piece], work.square)
    assert store.load(piece, tested=["object2"])["score"] == 1.0
    with pytest.raises(GatesError, match="was trained on 1 of the 2 objects"):
        store.load(piece, tested=["object1", "object2"])


def test_a_failure_names_the_piece_and_keeps_the_rest(run, work, tmp_path):
    store, log = run.store("squares", Figures()), tmp_path / "log"
    pieces = [
        run.piece(m, s, log=str(log)) for m, s in (("square", 1), ("broken", 2), ("square", 3))
    ]
    with pytest.raises(GatesError, match="broken-s2: it does not work"):
        run.obtain(store, pieces, work.square)
    assert store.find(pieces[0]) is not None
    assert "square-s3" not in logged(log)


def test_a_short_look_computes_nothing(run, work, tmp_path):
    store = run.store("squares", Figures())
    piece, other = run.piece("square", 1), run.piece("square", 2)
    run.obtain(store, [piece], work.square)
    quick = Run(run.folder, app="toy", settings=run.settings, quick=True)
    assert quick.obtain(quick.store("squares", Figures()), [piece, other], work.square) == [piece]


def test_a_short_look_computes_what_scores_are_made_of(run, work, capsys):
    quick = Run(run.folder, app="toy", settings=run.settings, quick=True)
    store, piece = quick.store("squares", Figures()), quick.piece("square", 2)
    prepared = []
    for _ in range(2):
        found = quick.obtain(
            store, [piece], work.square, scoring=True, prepare=lambda: prepared.append(1)
        )
        assert found == [piece]
    assert (prepared, store.load(piece)["score"]) == ([1], 4.0)
    assert "making 1 missing" in capsys.readouterr().out


def test_progress_is_whole_where_work_ends_early(run, work, monkeypatch):
    ticked = []

    @contextmanager
    def counted(label, total, unit):
        yield lambda: ticked.append((total, unit))

    monkeypatch.setattr("harness.experiment.run.ticking", counted)
    pieces = [run.piece("square", seed) for seed in range(3)]
    store = run.store("squares", Figures())
    run.obtain(store, pieces[1:], work.square, ticks=5)
    assert ticked == [(10, "parts")] * 10
    run.obtain(store, pieces, work.square, ticks=5, unit="epochs")
    assert ticked[10:] == [(5, "epochs")] * 5
    run.obtain(store, [run.piece("square", 3)], work.square)
    assert ticked[15:] == [(1, "")]


@pytest.mark.parametrize(("ticks", "number"), [("epochs", 3), ("steps", 24)])
def test_a_training_ticks_after_epochs_or_steps(tmp_path, work, ticks, number):
    seen = []
    job = Job(tmp_path, lambda: seen.append(1))
    job.fit(work.Regression(), work.Points(), max_epochs=3, ticks=ticks)
    assert len(seen) == number


def test_parts_of_a_result_survive_a_kill(tmp_path):
    made = []

    def make(name):
        if name == "fails":
            raise ValueError
        made.append(name)
        return {"score": float(len(made)), "nan": math.nan}

    def part(name):
        return Job(tmp_path).part(name, Figures(), lambda: make(name))

    first = part("a")
    with pytest.raises(ValueError):  # noqa: PT011
        part("fails")
    assert part("b")["score"] == 2
    again = part("a")
    assert made == ["a", "b"]
    assert again["score"] == first["score"] == 1
    assert math.isnan(again["nan"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-a", "part-b"]


@pytest.mark.fault("video H5")
@pytest.mark.fault("language 4")
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_damaged_checkpoint_of_a_killed_training_is_one_line(tmp_path, work, name):
    piece = Piece("ridge", 3, settings={"epochs": 1, "monitor": "val/loss"})
    work.train(piece, Job(tmp_path))
    path = tmp_path / "fit0" / name
    whole = torch.load(path, weights_only=True)
    if name == "last.ckpt":
        (tmp_path / "fit0/done").unlink()
    of_another = {**whole, "state_dict": {"a": torch.ones(1)}}
    for content, said in (
        (whole["state_dict"], "is not a checkpoint of a training run"),
        (of_another, "is a checkpoint of another network: Missing key"),
        (None, "is damaged or not a checkpoint"),
    ):
        torch.save(content, path)
        if content is None:
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(GatesError, match=f"{name} {said}") as found:
            work.train(piece, Job(tmp_path))
        assert str(found.value).endswith(f"delete {tmp_path / 'fit0'} to start again")
        assert "\n" not in str(found.value)


def test_callbacks_of_settings_take_part_in_a_training(tmp_path, work):
    path = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    given = [{"class_path": path, "init_args": {"scheduling": {0: 2}}}]
    found = [
        Job(tmp_path / name).fit(work.Regression(), work.Points(), max_epochs=1, **options)
        for name, options in {"with": {"callbacks": given}, "without": {}}.items()
    ]
    (one, *_), (other, *_) = (list(module.state_dict().values()) for module in found)
    assert not one.equal(other)
    wrong = [{"class_path": "no.such.Callback"}]
    with pytest.raises(GatesError, match="Callback cannot be made for the Trainer"):
        Job(tmp_path / "wrong").fit(work.Regression(), work.Points(), callbacks=wrong)


def test_a_choice_is_found_whatever_its_budget(run, work):
    names = ["inside", "inside@night"]
    box, plain = {names[0]: {"x": (1.0, 9.0)}}, {names[0]: {"x": 2.0}}
    made = run.tune(box, work.bowl, trials=2, plain=plain, steps=5, rate=1.0)
    assert run.chosen(names, budget=["steps"], rate=1.0) == made
    shipped = Run(run.folder.with_name("b"), app="toy", settings=run.settings)
    assert shipped.chosen(names, budget=["steps"], rate=1.0) == {}
    for other in ({"rate": 2.0}, {"rate": 1.0, "steps": 6}):
        budget = [] if "steps" in other else ["steps"]
        with pytest.raises(SettingsDiffer, match=r"choices/inside-s100 was made with other"):
            run.chosen(names, budget=budget, **other)


def test_only_some_methods_take_part(run, work):
    some = Run(run.folder, app="toy", settings=run.settings, only=["square"])
    store = some.store("squares", Figures())
    pieces = [some.piece("square", 1), some.piece("broken", 1)]
    assert some.obtain(store, pieces, work.square) == pieces[:1]
    path = some.finish([Row("square", "t", "m", 1.0)], [Bar("b", 1.0, "<=", 2.0)], seeds=[1])
    assert json.loads(path.read_text())["bars"] == []


def test_a_second_process_at_a_piece_ends_with_one_line(run, work, forked, tmp_path):
    script, log = tmp_path / "first.py", tmp_path / "log"
    script.write_text(
        "import sys\n"
        "import work\n"
        "from pathlib import Path\n"
        "from harness.experiment import Figures, Run\n"
        "run = Run(Path(sys.argv[1]), app='toy', settings={'model.dim': 8, 'data.n': None})\n"
        "piece = run.piece('square', 3, seconds=300, log=sys.argv[2])\n"
        "run.obtain(run.store('squares', Figures()), [piece], work.square)\n"
    )
    first = forked.Forked([str(script), str(run.folder), str(log)])
    try:
        while not log.is_file():
            assert first.poll() is None
            time.sleep(0.05)
        piece = run.piece("square", 3, seconds=300, log=str(log))
        with pytest.raises(GatesError, match="another process is at work on") as second:
            run.obtain(run.store("squares", Figures()), [piece], work.square)
    finally:
        first.kill()
    assert "\n" not in str(second.value)
    assert logged(log) == ["square-s3"]


@pytest.mark.parametrize("monitor", [None, "val/loss"])
def test_a_training_killed_at_any_step_ends_with_the_same_bits(tmp_path, forked, monitor):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, work\n"
        "from pathlib import Path\n"
        "from harness.experiment import Arrays, Run\n"
        "run = Run(Path(sys.argv[1]), app='toy')\n"
        f"piece = run.piece('ridge', 3, epochs=4, monitor={monitor!r})\n"
        "run.obtain(run.store('weights', Arrays()), [piece], work.train)\n"
    )
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    forked.finished([str(script), str(unbroken)])
    for step in (5, 16, 30):
        broken = forked.Forked(
            [str(script), str(killed)], {"KILL_AT": f"{tmp_path / f'at{step}'}@{step}"}
        )
        broken.communicate(60)
        assert broken.returncode == -9
    forked.finished([str(script), str(killed)])
    one, two = (Arrays().load(path / "weights" / "ridge-s3") for path in (unbroken, killed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    records = [read_record(path / "weights" / "ridge-s3") for path in (unbroken, killed)]
    same = [record._replace(seconds=0, command="", revision=None) for record in records]
    assert same[0] == same[1]


def test_an_optimum_beyond_the_box_is_reached_and_warned_of(run, work, capsys):
    spaces = {name: {"x": (1.0, 100.0)} for name in ("inside", "outside")}
    found = run.tune(spaces, work.bowl, trials=32)
    assert found["inside"].edges == []
    assert found["inside"].setting["x"] == pytest.approx(3.0, rel=0.3)
    assert 100.0 < found["outside"].setting["x"] < 200.0
    assert max(trial["x"] for trial in found["outside"].trials) <= 1000.0 * (1 + 1e-9)
    assert all(len(choice.trials) == 32 for choice in found.values())
    capsys.readouterr()
    assert run.tune(spaces, work.bowl, trials=32) == found
    assert "missing" not in capsys.readouterr().out


def test_an_optimum_at_the_edge_of_what_was_searched_is_kept_and_said(run, work, capsys):
    found = run.tune({"outside": {"x": (1.0, 2.0)}}, work.bowl, trials=8)
    assert found["outside"].edges == ["x"]
    assert "lies at an edge of what was searched" in capsys.readouterr().out
    listed = {"inside": [{"x": 3.0}, {"x": 9.0}, {"x": 27.0}]}
    assert run.tune(listed, work.bowl, trials=3)["inside"].edges == ["x"]


@pytest.mark.fault("46 D7")
def test_trials_without_a_score_hide_no_edge(run, work):
    choice = run.tune({"inside": {"x": (1.0, 2.0)}}, work.up_to_two, trials=16)["inside"]
    assert max(trial["x"] for trial in choice.trials) > 2.2
    assert choice.edges == ["x"]


def test_every_method_gets_as_many_trials(run, work, refuses):
    refuses(
        GatesError,
        (
            "lists 1 settings, but every method gets 2 trials",
            lambda: run.tune({"inside": [{"x": 1.0}]}, work.bowl, trials=2),
        ),
        (
            "positive numbers, the lower one first",
            lambda: run.tune({"inside": {"x": (2.0, 1.0)}}, work.bowl, trials=2),
        ),
        (
            "none of 3 trials has a score",
            lambda: run.tune({"nan": {"x": (1.0, 2.0)}}, work.bowl, trials=4),
        ),
    )


def test_what_is_plain_is_tried_first_and_searched_around(run, work):
    plain = {"inside": {"x": 3.0}}
    found = run.tune({"inside": {"x": (1.0, 9.0)}}, work.bowl, trials=8, plain=plain)["inside"]
    other = run.tune({"inside@a": {"x": (1.0, 9.0)}}, work.bowl, trials=8)["inside@a"]
    assert found.trials[0]["x"] == 3.0
    assert [one["x"] for one in found.trials[1:5]] == [one["x"] for one in other.trials[:4]]
    assert len(found.trials) == len(other.trials) == 8
    run.quick, space = True, {"outside": {"x": (1.0, 9.0)}}
    assert run.tune(space, work.bowl, trials=8)["outside"].setting == {"x": pytest.approx(3.0)}
    plain = {"outside": {"x": 4.0}}
    assert run.tune(space, work.bowl, trials=8, plain=plain)["outside"].setting == {"x": 4.0}


def test_every_method_keeps_its_own_settings_in_its_trials(run, work):
    spaces = {"inside": {"x": (1.0, 9.0)}, "outside": {"x": (1.0, 9.0)}}
    own = {"inside": {"net": "A"}, "outside": {"net": "B"}}
    found = run.tune(spaces, work.bowl, trials=4, own=own)
    records = [read_record(f.parent) for f in run.folder.glob("*/*/record.json")]
    assert {(r.identity["method"], r.settings["net"]) for r in records} == {
        ("inside", "A"), ("outside", "B")
    }  # fmt: skip
    assert "net" not in found["inside"].setting
    assert run.tune(spaces, work.bowl, trials=4, own=own) == found
    with pytest.raises(SettingsDiffer, match="net A, now C"):
        run.tune(spaces, work.bowl, trials=4, own={**own, "inside": {"net": "C"}})


def test_a_choice_may_be_for_a_task(run, work):
    found = run.tune({"inside@0.1/error": {"x": (1.0, 9.0)}}, work.bowl, trials=4)
    assert set(found) == {"inside@0.1/error"}
    assert (run.folder / "choices" / "inside-task-0.1_error-s100" / "record.json").is_file()


def test_scores_of_a_short_look_never_replace_full_ones(run, refuses):
    rows = [Row("a", "t", "m", 1.0)]
    data = [Data("set", "test", 64 * "0", 3, "objects")]
    run.finish(rows, [Bar("b", 3.0, "<=", 2.0)], seeds=[0], data=data, headline="A wins.")
    refuses(
        GatesError,
        (
            "holds a full evaluation, which a quick run would",
            lambda: Run(run.folder, app="toy", quick=True),
        ),
        (
            "which one of a, b alone would replace",
            lambda: Run(run.folder, app="toy", only=("a", "b"), seeds=[0]),
        ),
    )
    some = Run(run.folder, app="toy", only=("a",))  # tuning writes no scores
    with pytest.raises(GatesError, match="which one of a alone would replace"):
        some.finish(rows, seeds=[0])
    assert json.loads(run.scores.read_text())["data"] == [data[0].state()]
    assert "A wins." in run.scores.with_suffix(".md").read_text()


def test_scores_of_fewer_seeds_replace_those_of_more_only_when_asked(run):
    rows = [Row("a", "t", "m", 1.0)]
    run.finish(rows, seeds=[0, 1, 2])
    for refused in (
        lambda: Run(run.folder, app="toy", seeds=[0]),
        lambda: run.finish(rows, seeds=[3, 3]),
    ):
        with pytest.raises(
            GatesError, match="which one of 1 instead of 3 seeds would replace: add"
        ):
            refused()
    run.finish(rows, seeds=[1, 2, 3])
    Run(run.folder, app="toy", seeds=[0], only=("a",), overwrite=True).finish(rows, seeds=[0])
    assert json.loads(run.scores.read_text())["only"] == ["a"]
    Run(run.folder, app="toy", only=("a",), seeds=[0]).finish(rows, seeds=[0])


def test_a_part_replaces_its_own_rows_alone(run):
    run.finish([Row("a", "t", "m", 1.0)], [Bar("t", 1.0, "<=", 2.0)], seeds=[0])
    for value in (2.0, 3.0):
        run.finish([Row("a", "audit/x", "m", value)], seeds=[1], part="audit")
    content = json.loads(run.scores.read_text())
    assert [(row["task"], row["value"]) for row in content["rows"]] == [
        ("t", 1.0),
        ("audit/x", 3.0),
    ]
    assert (content["seeds"], len(content["bars"])) == ([0, 1], 1)


@pytest.mark.fault("endoscopy D20")
def test_missed_bars_are_named_and_tables_fit_a_pipe(run, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = [
        Row(f"method{i}", "task", f"a_rather_long_metric_{j}", 1 / (i + j + 1), 0.1, 2.0)
        for i in range(3)
        for j in range(9)
    ]
    run.finish(rows, [Bar("good", 1.0, "<=", 2.0), Bar("bad", 3.0, "<=", 2.0, "mm")], seeds=[0])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 120
    assert lines[-3:-1] == ["1 of 2 bars met.", "missed: bad 3.000, needed ≤ 2.000 mm"]
    assert lines[-1] == str(run.scores)


@pytest.mark.parametrize(
    ("form", "result"),
    [
        (Figures(), {"a": 1.5, "b": math.nan}),
        (Arrays(), {"w": torch.arange(6.0).reshape(2, 3).T}),
    ],
)
def test_forms_give_back_what_they_took_and_refuse_damage(refuses, tmp_path, form, result):
    form.save(tmp_path, result)
    assert repr(form.load(tmp_path)) == repr(result)
    (tmp_path / form.FILE).write_bytes(b"{")
    refuses(GatesError, ("missing or damaged", lambda: form.load(tmp_path)))


def test_tables_are_kept(refuses, tmp_path):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame({"a": [1, 2], "b": ["x", None]})
    Table().save(tmp_path, table)
    pd.testing.assert_frame_equal(Table().load(tmp_path), table)
    (tmp_path / Table.FILE).write_bytes(b"PAR1")
    refuses(GatesError, ("missing or damaged", lambda: Table().load(tmp_path)))


@pytest.mark.fault("video H6")
def test_a_result_is_bound_to_its_record(tmp_path, refuses):
    store = Store("weights", Arrays(), tmp_path / "run")
    one, other = Piece("one", settings={"a": 1}), Piece("other", settings={"a": 2})
    for number, piece in enumerate((one, other)):
        store.keep(piece, {"w": torch.full((3,), float(number))})
    file = tmp_path / "run/weights/one/result.safetensors"
    before = file.read_bytes()
    assert store.record(one).files == {"result.safetensors": sha256(file)}
    file.write_bytes((tmp_path / "run/weights/other/result.safetensors").read_bytes())
    refuses(
        GatesError,
        (r"one/result\.safetensors was changed after record", lambda: store.load(one)),
        ("was changed after", lambda: ship_results(tmp_path / "run", package=tmp_path / "package")),
    )
    file.write_bytes(before)
    assert store.load(one)["w"].sum() == 0


@pytest.mark.fault("video H6")
def test_a_record_without_digests_is_read_and_ships_with_them(tmp_path):
    store, piece = Store("weights", Arrays(), tmp_path / "run"), Piece("one", settings={"a": 1})
    folder = store.keep(piece, {"w": torch.ones(3, 4)})
    record = json.loads((folder / "record.json").read_text())
    del record["files"]
    (folder / "record.json").write_text(json.dumps(record))
    assert store.load(piece)["w"].sum() == 12
    assert store.record(piece).fingerprint == record["fingerprint"]
    for options in ({}, {"dtype": torch.bfloat16}, {"int8": True}):
        (shipped,) = ship_results(tmp_path / "run", package=tmp_path / "package", **options)
        assert read_record(shipped).files == {
            "result.safetensors": sha256(shipped / "result.safetensors")
        }


def test_shipped_commands_are_those_of_any_machine():
    given = "gates toy evaluate --root /a/runs --config c --overwrite --only=a --seeds 0,1 --resume"
    assert portable(given) == "gates toy evaluate --config c --seeds 0,1"
    assert portable("gates toy tune --config rooted") == "gates toy tune --config rooted"
    assert portable("gates toy tune --only '[a, b]' --seeds '[0, 1]'") == (
        "gates toy tune --seeds '[0, 1]'"
    )


def test_results_ship_with_their_records(tmp_path, work, capsys):
    run = Run(tmp_path / "run", app="toy", command="gates toy evaluate")
    pieces = [run.piece("ridge", seed, epochs=1) for seed in (0, 1)]
    store = run.store("weights", Arrays())
    run.obtain(store, pieces, work.train)
    run.tune({"inside": {"x": (1.0, 9.0)}}, work.bowl, trials=2)
    package = tmp_path / "package"
    assert ship([str(run.folder), "--package", str(package), "--bfloat16"]) == 0
    names = sorted(str(p.relative_to(package)) for p in package.glob("weights/default/*/*"))
    assert names == [
        "weights/default/choices/inside-s100",
        "weights/default/weights/ridge-s0",
        "weights/default/weights/ridge-s1",
    ]
    shipped = Store("weights", Arrays(), tmp_path / "other", package / "weights" / "default")
    exact, rounded = store.load(pieces[0]), shipped.load(pieces[0])
    assert all(torch.equal(rounded[n], cast(exact, torch.bfloat16)[n]) for n in exact)
    assert shipped.record(pieces[0]).command == "gates toy evaluate"
    assert ship([str(tmp_path / "nothing")]) == 2
    assert "holds no results to ship" in capsys.readouterr().err


@pytest.mark.fault("46 WEATHER")
def test_scores_ship_without_the_rows_that_nobody_reads(tmp_path, work, capsys):
    run = Run(tmp_path / "run", app="toy")
    package = tmp_path / "package"
    words = [str(run.folder), "--package", str(package), "--scores", "error", "cost"]
    run.obtain(run.store("weights", Arrays()), [run.piece("ridge", 0, epochs=1)], work.train)
    rows = [Row("ridge", "test", metric, 1.5) for metric in ("error", "spread", "cost")]
    rows.append(Row("ridge", "test", "error", 0.5, versus="lasso"))
    Run(run.folder, app="toy", only=["ridge"]).finish(rows, seeds=[0])
    assert ship(words) == 2
    assert "holds no full evaluation: run `evaluate` for all methods" in capsys.readouterr().err
    run.finish(rows, [Bar("good", 1.5, "<=", 2.0)], seeds=[0], headline="All good.")
    assert ship(words) == 0
    assert not (package / "weights/default/weights").exists()
    shipped = read_scores(package / "weights/default/scores.json", "toy")
    assert shipped == read_scores(run.scores, "toy")._replace(rows=[rows[0], rows[2]])
    assert shipped.bars[0].met


def test_what_pieces_share_is_prepared_once_if_anything_is_missing(run, work):
    calls = []
    store, piece = run.store("squares", Figures()), run.piece("square", 1)
    for _ in range(2):
        run.obtain(store, [piece], work.square, prepare=lambda: calls.append("squares"))
        run.tune(
            {"inside": {"x": (1.0, 9.0)}}, work.bowl, trials=3, prepare=lambda: calls.append("x")
        )
    assert calls == ["squares", "x", "x"]  # a box is searched in two rounds


def test_scores_of_other_verbs_stay(run):
    rows = [Row("a", "audit: x", "m", 1.0), Row("a", "audit: y", "m", 2.0)]
    run.finish(rows, [Bar("audit: x, most", 1.0, "<=", 2.0)], seeds=[1], part="audit: ")
    for value in (3.0, 4.0):
        run.finish([Row("a", "test", "m", value)], seeds=[0], others=("audit: ", "study: "))
    run.finish([Row("a", "audit: y", "m", 5.0)], seeds=[1], part=("audit: y", "audit: z"))
    content = json.loads(run.scores.read_text())
    found = {row["task"]: row["value"] for row in content["rows"]}
    assert (found, len(content["rows"])) == ({"test": 4.0, "audit: x": 1.0, "audit: y": 5.0}, 3)
    assert [bar["name"] for bar in content["bars"]] == ["audit: x, most"]


def test_matrices_in_8_bits_are_restored_within_the_bound_of_their_row(tmp_path):
    made = {
        "table": torch.randn(50, 8) * torch.logspace(-3, 3, 50).unsqueeze(1),
        "stacked": torch.randn(3, 5, 7),
        "bias": torch.randn(4),
        "zero": torch.zeros(2, 3),
        "count": torch.arange(6).view(2, 3),
        "norms.0.running_var": torch.tensor([[1e3, 1e-6]]),
    }
    Arrays().save(tmp_path, in_8_bits(made))
    found = Arrays().load(tmp_path)
    assert set(found) == set(made)
    for name in ("table", "stacked", "zero"):
        most = made[name].abs().amax(-1, keepdim=True)
        assert ((found[name] - made[name]).abs() <= most / 254 * 1.02 + 1e-12).all()
        assert found[name].dtype == torch.float32
    assert (found["table"] != made["table"]).any()
    assert torch.equal(found["bias"], made["bias"])
    assert torch.equal(found["count"], made["count"])
    assert torch.equal(found["norms.0.running_var"], made["norms.0.running_var"])


def test_some_methods_ship_in_8_bits(run, tmp_path):
    store = run.store("weights", Arrays())
    for method in ("a", "b"):
        store.keep(run.piece(method, 0), {"w": torch.randn(4, 6)})
    package = tmp_path / "package"
    assert ship([str(run.folder), "--package", str(package), "--int8", "--methods", "b"]) == 0
    (folder,) = package.glob("weights/*/weights/*")
    assert folder.name == "b-s0"
    assert "w scales" in load_file(folder / Arrays.FILE)
    shipped = read_record(folder)
    assert shipped.facts["rounded"] == "int8"
    assert shipped.fingerprint == store.record(run.piece("b", 0)).fingerprint
    assert "rounded" not in store.record(run.piece("b", 0)).facts
