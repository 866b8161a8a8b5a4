"""Studies and cues are kept under names that tell them apart."""

from dataclasses import replace

import pandas as pd
from apps.endoscopy.figures import study_figures
from apps.endoscopy.ladder import Cues

from apps.endoscopy.audit import FOLDER, Audit, table_rows
from endoscopy.renderer.config import RendererConfig


def test_data_sets_of_one_study_are_kept_and_drawn_apart(tmp_path, monkeypatch):
    table = pd.DataFrame({
        "variant": ["plain", "gates"], "accuracy": [0.9, 0.91], "accuracy_low": [0.88, 0.9],
        "accuracy_high": [0.92, 0.93], "seeds": [3, 3],
    })  # fmt: skip
    monkeypatch.setattr(Audit, "folder", tmp_path / FOLDER)
    monkeypatch.setattr(Audit, "_images", lambda self: SimpleImages)
    monkeypatch.setattr("apps.endoscopy.audit.generalization_study", lambda *_, **__: None)
    monkeypatch.setattr("apps.endoscopy.audit.generalization_table", lambda _: table)
    for images in ("digits", "/data/knitted wear"):
        Audit(None, None, images=images).run(["generalization"])
    drawn = dict(study_figures(tmp_path))
    assert [caption.rpartition(": ")[2] for caption in drawn.values()] == [
        "Handwritten digits.", "knitted_wear.",
    ]  # fmt: skip
    rows = table_rows("generalization_knitted_wear", table)
    assert [row.method for row in rows] == ["plain", "gates"]
    assert {row.task for row in rows} == {"audit: generalization_knitted_wear"}


class SimpleImages:
    train = ([],)


def test_cues_of_other_settings_are_other_files(tmp_path):
    config = RendererConfig()
    settings = [config, *(replace(config, **one) for one in (
        {"frames": 3}, {"brand": "B"}, {"shortcut_rho": 0.8}, {"seed": 1}, {"side": 32},
    ))]  # fmt: skip
    assert len({Cues(tmp_path).path(one, 0, 25) for one in settings}) == len(settings)
    assert Cues(tmp_path).path(config, 0, 25) == Cues(tmp_path).path(RendererConfig(), 0, 25)
