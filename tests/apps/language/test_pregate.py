"""``gates language pregate``: equal training, the folders that are kept, kills, and refusals."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.experiment import read_scores
from language.hf.pregating import level_of
from language.hf.pretrained import open_model

SHORT = ("--corpus", "corpus", "--context", "16", "--batch_size", "4", "--steps", "6",
         "--seeds", "[0]", "--learning_rate", "0.01")  # fmt: skip


@pytest.fixture(scope="module")
def pregated(trained):
    """The folder of a run with a model for each of two levels."""
    trained.said = trained.succeed("pregate", "--name", "levels", *SHORT, config=None)
    return trained.folder / "runs/language/levels"


def test_models_differ_in_their_gates_alone(pregated, trained):
    folders = {level: pregated / f"models/{name}-s0" for level, name in
               {None: "conventional", 1: "level-1", 2: "level-2"}.items()}  # fmt: skip
    for level, folder in folders.items():
        assert str(folder.relative_to(trained.folder)) in trained.said
        model = open_model(folder)
        assert (level_of(model), (folder / "README.md").is_file()) == (level, level is not None)
    first, second = (json.loads((folders[n] / "record.json").read_text()) for n in (1, 2))
    assert first["facts"]["before"] != second["facts"]["before"]
    assert sum(first["facts"]["after"]) < sum(first["facts"]["before"])
    tokens = torch.arange(16)[None]
    stock = AutoModelForCausalLM.from_pretrained(folders[1])
    with torch.no_grad():
        gap = stock(tokens).logits - open_model(folders[1])(tokens).logits
    assert gap.abs().max() > 1e-3


def test_the_scores_are_differences_from_the_conventional_model(pregated, trained):
    scores = read_scores(pregated / "scores.json", "language")
    versus = {row.method: row.value for row in scores.rows if row.versus}
    values = {row.method: row.value for row in scores.rows if not row.versus}
    assert versus.keys() == values.keys() - {"conventional"}
    for method, gap in versus.items():
        assert gap == pytest.approx(values[method] - values["conventional"])
    (bar,) = scores.bars
    assert (bar.value, bar.bar) == (versus["level 1"], 0.02)
    assert f"level 1 {versus['level 1']:+.4f} [" in scores.headline
    assert "not trained" not in scores.headline
    again = trained.succeed("pregate", "--name", "levels", *SHORT, config=None)
    assert "making" not in again


@pytest.mark.slow  # four interpreters that import transformers
def test_killed_and_resumed(language_folder, kill_and_resume):
    words = ["language", "pregate", *SHORT]
    words[words.index("corpus")] = str(language_folder / "corpus")
    words[words.index("6")] = "12"
    kill_and_resume(
        words, app="language", compare=["*/*/model.safetensors", "scores.json"], kills=2
    )


def test_misuse_is_one_line(trained, weights, faulty_inputs):
    call = ("language", "pregate", "--name", "new", *SHORT)
    faulty_inputs(
        {
            "a dense model": (
                (*call, "--model", str(weights)),
                "Qwen3ForCausalLM has no layers whose gate chooses experts",
            ),
            "no such folder": ((*call, "--model", "nowhere"), "nowhere holds no config.json"),
            "level 0": ((*call, "--levels", "[1,0]"), "level is 0, but .* has 6 layers of experts"),
            "no levels": ((*call, "--levels", "[]"), r"--levels is \[\] and --seeds is"),
            "no seeds": ((*call, "--seeds", "[]"), r"--seeds is \[\], expected one or more"),
            "no steps": ((*call, "--steps", "0"), "steps must be at least 1, got 0"),
            "a rate of 0": (
                (*call, "--learning_rate", "0"),
                "learning_rate must be positive, got 0",
            ),
        },
        folder=trained.folder,
    )
    whole = ("language", "pregate", "--name", "levels", *SHORT, "--levels")
    faulty_inputs(
        {"a level too many": ((*whole, "[6]"), "level is 6, but .* has 6 layers of experts")},
        folder=trained.folder,
    )
