import sys


def test_killed_trainings_of_both_stages_end_like_unbroken_ones(kill_and_resume, tmp_path):
    """The kills fall into recorded backgrounds and into blocks of the module's own forecasts."""
    source = "--data.source.init_args."
    command = [
        sys.executable,
        "-m",
        "apps.main",
        "weather",
        "fit",
        "--config",
        "unit",
        f"{source}world.init_args.path={tmp_path / 'nature.zarr'}",
        f"{source}recording={tmp_path / 'recording.safetensors'}",
        "--checkpoint.every_n_steps=1",
    ]
    folder = kill_and_resume(command, app="weather", seed=1)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) >= 1 + 14
    assert "val/score" in rows[0]
