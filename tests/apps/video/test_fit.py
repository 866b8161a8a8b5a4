"""``gates video fit``: the network that is kept is the one that was asked for."""

import polars as pl
import pytest
import torch
from torch.testing import assert_close

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

    def run(*words, name="run", fails=False):
        source = ["--data.source.init_args.path", "t.csv", "--data.source.init_args.split", "row"]
        words = [*source, "--data.source.init_args.labels", "[y]", *words]
        short = ["--trainer.max_epochs", "1", "--data.batch_size", "64"]
        code = main(["video", "fit", "--config", "table", "--name", name, *words, *short])
        assert code == 2 if fails else code in (0, None)
        return None if fails else load_model(tmp_path / "runs" / "video" / name / "model")

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


@pytest.mark.slow
def test_a_network_that_starts_from_a_trained_linear(fitted, tmp_path, capsys):
    """With rates of nearly zero it predicts what the linear model does; its rows are the same."""
    linear = ("--model.net", "Linear", "--model.options", "{}")
    first = fitted(*linear, "--model.embedding_learning_rate", "0.3", name="first")
    wide = f"{{deep: MMoE, deep_options: {{{HOME.replace('rank: [1, 1], ', '')}}}}}"
    still = ("--model.learning_rate", "1e-12", "--model.embedding_learning_rate", "1e-12")
    start = ("--model.start", "runs/video/first/model")
    words = ("--model.net", "WideAndDeep", "--model.options", wide, *still)
    found = fitted(*words, *start)
    rows = torch.randint(2, 9, (20, len(found.transform.sparse_tables)))
    batch = (rows.clamp(max=min(found.transform.sizes.values()) - 1), torch.randn(20, 0))
    if found.transform.dense_width:
        batch = (batch[0], torch.randn(20, found.transform.dense_width))
    assert_close(found.ranker(*batch), first.ranker(*batch), rtol=0, atol=1e-4)
    assert not torch.allclose(found.ranker(*batch), fitted(*words, name="cold").ranker(*batch))
    settings = found.settings["settings"]
    assert len(settings["content.start"]) == 16
    assert "model.start" not in settings
    capsys.readouterr()
    for wrong, message in (
        (("--model.start", "runs/nothing"), "is no model folder, it has no config.json"),
        ((*start, "--data.source.init_args.validation", "0.4"), "encodes rows"),
        (
            (*start, *linear[:2], "--model.options", "{}", "--model.net", "MMoE"),
            "MMoE cannot start from",
        ),
    ):
        fitted(*words, *wrong, name="wrong", fails=True)
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["video", "evaluate", "--config", "tiny", *start]) == 2
    assert "--model.start is for fit" in capsys.readouterr().err
