import json


def test_the_production_shape_is_that_of_the_specification(tmp_path, gates_in):
    gates = gates_in(tmp_path)
    gates.succeed("video", "plan", "--config", "production", "--gpus", "64")
    found = json.loads((tmp_path / "runs/video/production/plan.json").read_text())
    assert 2000 <= found["shape"]["inputs of the network"]["value"] <= 8000
    assert found["shape"]["columns"]["value"] > 200
    assert "utilization must be at most 1" in gates.refuse(
        "video", "plan", "--device.utilization", "2"
    )
