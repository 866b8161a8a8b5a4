"""``gates video fit``: a network that predicts the same through every door, for every file of
settings, also after kills."""

import json
import re
import shutil

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch

from core_gates import GatesError
from recsys import TableScorer
from recsys.experiments import (
    data_of,
    module_of,
    probabilities,
    summed_log_loss_of,
)
from recsys.export import load_exported
from recsys.model_folder import load_model
from video_multitask.service.ranking_scorer import loader
from video_multitask.service.serving_model import scored

INIT = "data.source.init_args."


@pytest.fixture(scope="module")
def trained(feed):
    """Data of the run, the record of its network, and probabilities of its test rows."""
    folder = feed.folder / "runs/video/small"
    model = load_model(folder / "model")
    data = data_of({n: v for n, v in model.settings["settings"].items() if n != "data.digest"})
    return folder, model, data, probabilities(model.ranker, data.batch("test"))


@pytest.mark.costly("the training that other tests share")
def test_fit_leaves_weights_a_model_folder_and_a_log(trained):
    folder, model, data, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "record.json", "checkpoints", "model", "weights"}
    log = pl.read_csv(folder / "metrics.csv")
    assert {"train/loss", "val/loss", "val/auc_effective_view"} <= set(log.columns)
    record = json.loads((folder / "weights/fit-s0/record.json").read_text())
    assert record["objects"] == data.training_objects() == model.settings["training_objects"]
    assert model.transform.fitted.rows == len(data.table("train"))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of Lightning
def test_the_validation_loss_is_that_of_the_model_folder(trained):
    """Of Lightning's log, of Lightning's ``validate``, and by hand."""
    folder, model, data, _ = trained
    rows = data.batch("validation")
    expected = summed_log_loss_of(rows, probabilities(model.ranker, rows))
    logged = pl.read_csv(folder / "metrics.csv")["val/loss"].drop_nulls().min()
    assert logged == pytest.approx(expected, abs=1e-6)
    module = module_of(model.settings["settings"])
    module.build(data.transform)
    state = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(state)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False,
                        enable_checkpointing=False, accelerator="cpu")  # fmt: skip
    (found,) = trainer.validate(module, data, verbose=False)
    assert found["val/loss"] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(np.concatenate(trainer.predict(module, data)), trained[3], atol=1e-6)


def test_score_writes_the_same_probabilities(feed, trained, tmp_path):
    _, model, data, expected = trained
    table = data.table("test")
    np.testing.assert_allclose(
        TableScorer(model.ranker, model.transform).score(table).probabilities, expected, atol=1e-6
    )
    (tmp_path / "rows").mkdir()
    table[:30].write_parquet(tmp_path / "rows/a.parquet")
    table[30:].drop(data.schema.labels).write_csv(tmp_path / "rows/b.csv")
    feed.succeed("video", "score", tmp_path / "rows", "--name", "small", "--output", tmp_path / "o")
    parts = [pl.read_parquet(tmp_path / f"o/{name}.parquet") for name in "ab"]
    found = pl.concat([part.cast({"time_ms": pl.Int64}) for part in parts])
    columns = [f"p_{task}" for task in data.schema.task_names]
    np.testing.assert_allclose(found.select(columns).to_numpy(), expected, atol=1e-6)
    keys = ["user_id", "video_id", "time_ms"]
    assert found.select(keys).rows() == table.select(keys).rows()


def test_the_service_answers_the_same_probabilities(trained):
    folder, _, data, expected = trained
    scorer = loader(None, None, "score")(folder / "model")
    sides = dict.fromkeys(data.schema.features, "context")
    sides |= {f.name: f.side for f in (*data.schema.sparse, *data.schema.dense)}
    for number, row in enumerate(data.table("test")[:20].to_dicts()):
        user, item, context = (
            {name: row[name] for name, of in sides.items() if of == side}
            for side in ("user", "item", "context")
        )
        content = {"user": user, "context": context, "candidates": [item]}
        request = scorer.read(json.loads(json.dumps(content)), 10)
        answer = scorer.answer(request, scored(scorer, [request])[0])
        np.testing.assert_allclose(answer["probabilities"], expected[[number]], atol=1e-6)


@pytest.mark.slow
def test_exported_files_give_the_same_probabilities(feed, trained):
    _, _, data, expected = trained
    command = ("video", "export", "--name", "small", "--formats", "[torch]")
    path = feed.folder / feed.succeed(*command).out.splitlines()[-1]
    found = load_exported(path)
    for rows in (data.batch("test"), data.batch("test").take(slice(0, 3))):
        given = torch.as_tensor(found(rows.sparse, rows.dense, *rows.sequences)).double().sigmoid()
        np.testing.assert_allclose(given, expected[: len(rows)], atol=1e-5)
    before = path.read_bytes()
    assert "exists: choose another --output or add --overwrite_output" in feed.refuse(*command)
    assert path.read_bytes() == before


@pytest.mark.costly("every verb that writes, twice")
def test_verbs_that_write_refuse_to_write_twice(feed, small_feed, gates_in, tmp_path):
    gates = gates_in(tmp_path)
    small_feed(tmp_path)
    simulate = ("video", "simulate", "--rows", 600, "--users", 20, "--videos", 60, "--days", 3)
    for words in (simulate, ("video", "fit", "--config", "small")):
        gates.succeed(*words)
        assert "exists: " in gates.refuse(*words)
    weights = tmp_path / "runs/video/small/weights/fit-s0/result.safetensors"
    first = weights.read_bytes()
    assert first == (feed.folder / "runs/video/small/weights/fit-s0" / weights.name).read_bytes()
    model = load_model(tmp_path / "runs/video/small/model").hash
    gates.video("fit", "--overwrite", "--seed_everything", 1)
    assert weights.read_bytes() == first  # another seed is another result
    assert (weights.parents[1] / "fit-s1" / weights.name).read_bytes() != first
    assert load_model(tmp_path / "runs/video/small/model").hash != model
    gates.succeed(*simulate, "--overwrite_output")
    truth = pl.read_parquet(tmp_path / "runs/video/tiny/simulated/truth.parquet")
    assert len(truth) == 600
    assert 0 < truth["like"].mean() < truth["effective_view"].mean() < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed_everything", 3], r"seed 0, now 3"),
        (["--model.learning_rate", 0.5], r"model\.learning_rate 0\.003, now 0\.5"),
        ([f"--{INIT}rows", 1400], rf"{INIT}rows 1500, now 1400"),
        (["--model.net", "MMoE"], r"model\.net HoME, now MMoE"),
        (["--trainer.max_epochs", 1, "--data.batch_size", 100], r"data\.batch_size 256, now 100"),
    ],
)
def test_what_is_resumed_must_be_the_same(feed, faulty_inputs, words, said):
    command = ("video", "fit", "--config", "small", "--resume", *words)
    faulty_inputs({"other": (command, said)}, run=feed, folder=feed.folder)


@pytest.mark.costly("three processes that train")
def test_killed_trainings_end_like_uninterrupted_ones(small_feed, kill_and_resume, tmp_path):
    command = ["video", "fit", "--config", str(small_feed(tmp_path, epochs=2, rows=900))]
    command += ["--checkpoint.every_n_steps", "1", "--trainer.log_every_n_steps", "1"]
    folder = kill_and_resume(command, app="video", rows=[3])
    whole = tmp_path / "whole/video/run"
    for name in ("model/model.safetensors", "weights/fit-s0/result.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_the_folder_of_a_run_survives_a_failed_fit(feed, gates_in, tmp_path):
    """A run folder is claimed only when the data are there."""
    shutil.copytree(feed.folder, tmp_path / "copy")
    gates = gates_in(tmp_path / "copy")
    before = sorted(p for p in (tmp_path / "copy").rglob("*"))
    words = ["--data.source.class_path", "recsys.data.readers.own_table.OwnTable"]
    words += ["--data.source.init_args", '{"path": "absent.csv", "labels": ["y"]}']
    assert "absent.csv does not exist" in gates.refuse(
        "video", "fit", "--config", "small", "--overwrite", *words
    )
    assert sorted(p for p in (tmp_path / "copy").rglob("*")) == before


@pytest.mark.fault("video H3")
def test_the_model_of_another_training_is_not_used(feed, gates_in, tmp_path, monkeypatch):
    """One that an overwriting training has not replaced, since it was stopped."""

    def stop(*_):
        raise GatesError("stopped")

    folder = tmp_path / "copy"
    shutil.copytree(feed.folder, folder)
    gates = gates_in(folder)
    verbs = [("score", folder / "rows.parquet", "--name", "small", "--output", "scored"),
             ("export", "--name", "small", "--formats", "torch", "--output", "exported"),
             ("serve", "--name", "small"), ("plan", "--name", "small")]  # fmt: skip
    model = load_model(folder / "runs/video/small/model")
    data = data_of({n: v for n, v in model.settings["settings"].items() if n != "data.digest"})
    data.table("test").write_parquet(folder / "rows.parquet")
    words = ("video", "fit", "--config", "small", "--model.learning_rate", 0.02)
    with monkeypatch.context() as stopped:
        stopped.setattr("apps.video.training_verbs.keep_model", stop)
        assert gates(*words, "--overwrite").err.endswith("stopped\n")
    for verb in verbs:
        refused = gates.refuse("video", *verb)
        assert "is no model of the training in" in refused
        assert "model.learning_rate" in refused
    said = gates.succeed(*words, "--resume").out
    counts = re.search(r"weights: ([\d,]+) of the network, ([\d,]+) of embedding tables", said)
    dense, tables = (int(number.replace(",", "")) for number in counts.groups())
    kept = load_model(folder / "runs/video/small/model").ranker
    assert dense + tables == sum(parameter.numel() for parameter in kept.parameters())
    assert tables == sum(table.numel() for table in kept.tables())
    for verb in (verbs[0], verbs[3]):
        gates.succeed("video", *verb)
