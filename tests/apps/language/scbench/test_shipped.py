"""What ships of SCBench: the scores of the retriever, which the evaluation takes as they are."""

import json
from pathlib import Path

import yaml

from tests.fixtures.gates_in_folder import GatesInFolder

CONFIG = Path(__file__).parents[4] / "apps/language/configs/scbench.yaml"


def test_scores_of_the_retriever_ship_and_meet_their_bars(tmp_path):
    models = yaml.safe_load(CONFIG.read_text())["evaluate"]["models"]
    asked = json.dumps({"retriever": models["retriever"]})
    command = ("language", "evaluate", "--config", "scbench", "--models", asked, "--texts", 0)
    said = GatesInFolder(tmp_path).succeed(*command).out
    assert "missing" not in said  # nothing is asked again
    content = json.loads((tmp_path / "runs/language/scbench/scores.json").read_text())
    assert len(content["bars"]) == 11
    assert all(bar["met"] for bar in content["bars"])
    rows = [row for row in content["rows"] if row["metric"] == "accuracy" and not row["versus"]]
    accuracy = {(row["task"].rpartition(", ")[2], row["method"]): row["value"] for row in rows}
    assert len(accuracy) == 2 * 28
    for mode in ("turns", "requests"):
        assert accuracy[mode, "full"] == accuracy[mode, "oracle:keep=0.25"] == 1
        assert accuracy[mode, "streaming:keep=0.25"] < accuracy[mode, "streaming:keep=0.5"] < 0.6
