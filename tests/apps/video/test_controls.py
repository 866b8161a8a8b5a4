import json

import pytest
import torch
import yaml

from apps.video import controls
from apps.video.commands import main
from apps.video.controls import control_rows_and_bars, score_control
from core_gates import GatesError
from harness.command.configfile import decisive_settings
from harness.experiment import Job, Run
from recsys.experiments import Contest, chance_bars, data_of

SOURCE = "video_multitask.sources.simulated.SimulatedFeed"
FEED = {"rows": 4000, "users": 80, "videos": 100, "days": 4, "validation_days": 1, "test_days": 1}
CONFIG = {
    "seed_everything": 0,
    "model": {
        "net": "HoME",
        "options": {"dim": 4, "hidden_dims": [4], "rank": [2, 2], "tower_dims": [4]},
        "learning_rate": 0.01,
        "embedding_learning_rate": 0.05,
    },
    "data": {"source": {"class_path": SOURCE, "init_args": FEED}, "batch_size": 128},
    "trainer": {"max_epochs": 2},
    "checkpoint": {"monitor": "val/loss"},
    "contest": {
        "methods": {"home": {"net": "HoME"}},
        "baselines": {"duration": {"kind": "one_column", "column": "duration_ms"}},
    },
    "evaluate": {"seeds": [0], "controls": True, "slices": True, "claims": {"bounded": True}},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Work in this process, on few logs."""
    monkeypatch.setattr(controls, "LOGS", 8)
    monkeypatch.setattr(controls, "ESTIMATED", ("effective_view",))
    monkeypatch.setattr(controls, "ROWS", 600)
    monkeypatch.setattr(controls, "TRUTH_ROWS", 20_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def find(run, **options):
    data = data_of(run.settings)
    absent = run.folder / "absent.parquet"
    return control_rows_and_bars(
        run, Contest(**CONFIG["contest"]), data, places={}, open_bandit=absent, **options
    )


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", app="video", settings=decisive_settings(CONFIG))


@pytest.mark.slow
def test_controls_are_made_once(run, capsys, monkeypatch):
    found = find(run)
    assert "permuted_labels-s0, planted_leak-s0" in capsys.readouterr().out
    bars = {bar.name: bar for bar in found.bars}
    kinds = ("world", "permuted labels", "planted leak of effective_view", "off-policy")
    assert {name.partition(":")[0] for name in bars} == set(kinds)
    missed = [name for name, bar in bars.items() if not bar.met]
    assert [name for name in missed if not name.startswith("world: mean")] == []
    assert {row.task for row in found.rows} == {"controls"}
    assert any("no file" in note for note in found.notes)

    monkeypatch.setattr(controls, "train", None)
    monkeypatch.setattr(controls, "redraw", None)
    assert (repr(find(run)), capsys.readouterr().out) == (repr(found), "")


def test_labels_that_were_not_permuted_fail_the_control(run, tmp_path):
    """The control without its permutation: the network predicts what it should not."""
    figures = score_control(run.piece("permuted_labels", 0), Job(tmp_path / "work"), {})
    bars = chance_bars(
        "control", controls._chances(figures, data_of(run.settings).schema.task_names)
    )
    assert sum(not bar.met for bar in bars) >= 3


def test_a_quick_run_trains_nothing(tmp_path):
    found = find(Run(tmp_path / "run", app="video", settings=decisive_settings(CONFIG), quick=True))
    assert ({row.method for row in found.rows}, len(found.bars)) == ({"world"}, 14)


def test_other_data_have_no_controls(tmp_path):
    census = {"class_path": "recsys.data.readers.census.Census", "init_args": {"path": "x"}}
    settings = decisive_settings({**CONFIG, "data": {"source": census}})
    run = Run(tmp_path / "run", app="video", settings=settings)
    with pytest.raises(GatesError, match=r"data\.source Census cannot permute .* leave out"):
        control_rows_and_bars(run, Contest(), None, places={}, open_bandit=tmp_path / "x")


@pytest.mark.costly("an evaluation with controls and slices")
def test_evaluate_scores_controls_and_slices(tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    main(["evaluate", "--config", str(config), "--root", str(tmp_path), "--name", "small",
          "--open_bandit", str(tmp_path / "absent.parquet")])  # fmt: skip
    scores = json.loads(next(tmp_path.rglob("scores.json")).read_text())
    assert {"controls", "slices", "test"} <= {row["task"] for row in scores["rows"]}
    sliced = {
        (row["method"], row["versus"], row["metric"])
        for row in scores["rows"]
        if row["task"] == "slices"
    }
    for part in ("known users", "activity 1/4", "exposure 4/4", "ranked exposure"):
        assert ("home", None, f"log-loss, {part}") in sliced
        assert ("oracle", "home", f"log-loss, {part}") in sliced
        assert ("test rows", None, f"log-loss, {part}") in sliced
    assert any(bar["name"].startswith("off-policy: intervals") for bar in scores["bars"])
    assert any("left out: no file" in note for note in scores["notes"])
    printed = capsys.readouterr().out
    assert "AUC, max |z|" in printed
    assert "effective rows" in printed
