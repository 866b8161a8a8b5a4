"""Studies and cues are kept under names that tell them apart."""

from dataclasses import replace

import pandas as pd
import torch

from apps.endoscopy import audit
from endoscopy.plots.captioned import study_figures
from endoscopy.renderer.config import RendererConfig
from harness.experiment import Run
from harness.experiment.scores import read_scores


class SimpleImages:
    train = ([],)


def test_data_sets_of_one_study_are_kept_and_drawn_apart(tmp_path, monkeypatch):
    table = pd.DataFrame({
        "variant": ["plain", "gates"], "accuracy": [0.9, 0.91], "accuracy_low": [0.88, 0.9],
        "accuracy_high": [0.92, 0.93], "seeds": [3, 3],
    })  # fmt: skip
    monkeypatch.setattr(audit, "_images", lambda _: SimpleImages)
    monkeypatch.setattr(audit, "generalization_study", lambda *_, **__: None)
    monkeypatch.setattr(audit, "generalization_table", lambda _: table)
    run = Run(tmp_path, app="endoscopy")
    for images in ("digits", "/data/knitted wear"):
        path = audit.run_study(run, "generalization", images)
    drawn = dict(study_figures(tmp_path))
    assert [caption.rpartition(": ")[2] for caption in drawn.values()] == [
        "Handwritten digits.", "knitted_wear.",
    ]  # fmt: skip
    rows = read_scores(path, "endoscopy").rows
    assert [row.method for row in rows] == ["plain", "gates"] * 2
    names = ("digits", "knitted_wear")
    assert {row.task for row in rows} == {f"study: generalization_{name}" for name in names}


def test_cues_are_rendered_once_and_those_of_other_settings_are_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(audit, "CHUNK", 2)
    config, run = RendererConfig(side=32, frames=1), Run(tmp_path, app="endoscopy", overwrite=True)
    first = audit.rendered_cues(run, config, range(3))
    assert "cues missing: 2 of 2" in capsys.readouterr().out
    assert set(first) == {"fixed", "agc"}
    assert [len(table) for table in first.values()] == [3, 3]
    again = audit.rendered_cues(run, config, range(3))
    assert "missing" not in capsys.readouterr().out
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, again[name])
    for change in ({"brand": "B"}, {"shortcut_rho": 0.8}):
        other = audit.rendered_cues(run, replace(config, **change), range(3))
        assert "cues missing: 2 of 2" in capsys.readouterr().out
        assert not other["fixed"].equals(first["fixed"])
