import json

import pytest


@pytest.mark.slow
def test_the_published_size(tmp_path, gates_in):
    gates = gates_in(tmp_path)
    gates.succeed("weather", "plan", "--config", "official", "--gpus", "8")
    found = json.loads((tmp_path / "runs/weather/official/plan.json").read_text())
    assert round(found["adas: network"]["parameters"]["value"] / 1e6, 1) == 291.3
    assert found["adas: memory of each of 8 GPUs"]["activations"]["value"] > 20e9
    assert found["fengwu: arithmetic of a sample"]["training"]["value"] > 1e13
    assert "utilization must be at most 1" in gates.refuse(
        "weather", "plan", "--device.utilization", "2"
    )
