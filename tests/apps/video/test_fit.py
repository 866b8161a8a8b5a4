"""``gates video fit``: the network that is kept is the one that was asked for."""

import polars as pl
import pytest

from apps.main import main
from recsys.model_folder import load_model

HOME = "dim: 4, hidden_dims: [4], rank: [1, 1], tower_dims: [2]"


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """Train on a small table with some options; return what the model folder holds."""
    monkeypatch.chdir(tmp_path)
    rows = {"who": range(240), "c": [n % 7 for n in range(240)], "a.b": [0, 1, 1] * 80}
    rows |= {"y": [n % 5 % 2 for n in range(240)]}
    pl.DataFrame(rows).with_columns(pl.col("who") % 40).write_csv("t.csv")

    def run(*words):
        source = ["--data.source.init_args.path", "t.csv", "--data.source.init_args.split", "row"]
        words = [*source, "--data.source.init_args.labels", "[y]", *words]
        short = ["--trainer.max_epochs", "1", "--data.batch_size", "64"]
        code = main(["video", "fit", "--config", "table", "--name", "run", *words, *short])
        assert code in (0, None)
        return load_model(tmp_path / "runs" / "video" / "run" / "model")

    return run


@pytest.mark.fault("video V22")
def test_an_option_that_is_null(fitted):
    found = fitted("--model.options", f"{{{HOME}, norm: null}}")
    assert found.ranker.spec.options["norm"] is None
    assert not any("norms" in name for name, _ in found.ranker.net.named_parameters())
    assert found.settings["settings"]["model.options"]["norm"] is None


@pytest.mark.fault("video V22")
def test_labels_with_a_dot_and_a_category(fitted):
    words = ("--model.options", f"{{{HOME}}}", "--data.source.init_args.labels")
    found = fitted(*words, "{a.b: watch, y: like}")
    assert [(task.name, task.category) for task in found.ranker.schema.tasks] == [
        ("a.b", "watch"), ("y", "like"),
    ]  # fmt: skip
    labels = found.settings["settings"]["data.source.init_args.labels"]
    assert labels == {"a.b": "watch", "y": "like"}
