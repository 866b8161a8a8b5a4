"""The streaming study with real processes: written, trained, killed, resumed."""

import json
from pathlib import Path

import pytest

from apps.main import main

CONFIG = Path(__file__).parents[2] / "benchmarks/recsys/stream.yaml"
SOURCE = "--data.source.init_args."


@pytest.mark.slow
def test_a_stream_is_written_trained_killed_and_resumed(tmp_path):
    words = ["video", "evaluate", "--config", str(CONFIG), "--root", str(tmp_path)]
    sizes = {"rows": 30_000, "users": 300, "videos": 500, "days": 5, "row_group": 512,
             "window": 2048}  # fmt: skip
    words += [f"{SOURCE}{name}={value}" for name, value in sizes.items()]
    words += ["--data.batch_size=256", "--study.init_args.prefix_steps=24"]
    assert main([*words, "--study.init_args.kills=2"]) == 0
    scores = json.loads((tmp_path / "video" / "stream" / "scores.json").read_text())
    found = {(row["method"], row["metric"]): row["value"] for row in scores["rows"]}
    assert found["kills", "losses_compared"] == 24
    assert found["kills", "losses_that_differ"] == found["kills", "tensors_that_differ"] == 0
    assert (found["kills", "kills"], found["one_pass", "steps"]) == (2, 18_000 // 256)
    assert 300 < found["one_pass", "peak_mb"] < 1500
