"""Studies and cues are kept under distinct names."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from apps.endoscopy import size_scoring
from endoscopy.renderer import RendererConfig
from harness.experiment import Run, read_scores


class SimpleImages:
    train = ([],)


def test_data_sets_of_one_study_are_kept_apart_and_compared(tmp_path, monkeypatch):
    table = pd.DataFrame({
        "variant": ["plain", "gates"], "accuracy": [0.9, 0.91], "accuracy_low": [0.88, 0.9],
        "accuracy_high": [0.92, 0.93], "seeds": [3, 3],
    }).assign(
        accuracy_difference=[np.nan, 0.01], accuracy_difference_low=[np.nan, 0.002],
        accuracy_difference_high=[np.nan, 0.02], accuracy_p_value=[np.nan, 0.03],
    )  # fmt: skip
    monkeypatch.setattr(size_scoring, "_images", lambda _: SimpleImages)
    monkeypatch.setattr(size_scoring, "generalization_study", lambda *_, **__: None)
    monkeypatch.setattr(size_scoring, "generalization_table", lambda _: table)
    run = Run(tmp_path, app="endoscopy")
    for images in ("digits", "/data/knitted wear"):
        path = size_scoring.run_study(run, "generalization", images)
    rows = read_scores(path, "endoscopy").rows
    names = ("digits", "knitted_wear")
    for name in names:
        assert (tmp_path / f"audits/generalization_{name}.parquet").is_file()
        own = [row for row in rows if row.task == f"study: generalization_{name}"]
        assert [row.label for row in own] == ["plain", "gates", "gates − plain"]
        assert {row.metric for row in own} == {"accuracy"}
        assert own[-1][3:-1] == (0.01, 0.002, 0.02, 3, "plain", 0.03)
    assert len(rows) == 3 * len(names)


def test_cues_are_rendered_once_and_those_of_other_settings_are_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(size_scoring, "CHUNK", 2)
    config, run = RendererConfig(side=32, frames=1), Run(tmp_path, app="endoscopy", overwrite=True)
    first = size_scoring.rendered_cues(run, config, range(3))
    assert "making 2 missing cues: " in capsys.readouterr().out
    assert (set(first), [len(table) for table in first.values()]) == ({"fixed", "agc"}, [3, 3])
    again = size_scoring.rendered_cues(run, config, range(3))
    assert "missing" not in capsys.readouterr().out
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, again[name])
    for change in ({"brand": "B"}, {"shortcut_rho": 0.8}):
        other = size_scoring.rendered_cues(run, replace(config, **change), range(3))
        assert "making 2 missing cues: " in capsys.readouterr().out
        assert not other["fixed"].equals(first["fixed"])
