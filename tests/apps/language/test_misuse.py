"""Faulty calls: one line, exit code 2, nothing is written."""

import shutil

import pytest

from harness.command.configfile import packaged_configs

FIT = ("language", "fit", "--config", "small", "--name", "new", "--data.cache_folder", "null")
GATE = "--model.model.init_args.gate"
EXPERTS = "--model.model.init_args.experts"
OURS = "{class_path: core_gates.StackedExperts, init_args: {hidden_dim: 8}}"


def generate(*words, prompt="def"):
    return ("language", "generate", "--config", "small", "--prompt", prompt, *words)


def gate(name, **options):
    content = ", ".join(f"{key}: {value}" for key, value in options.items())
    return (f"{GATE}={{class_path: core_gates.{name}, init_args: {{{content}}}}}",
            f"{EXPERTS}={OURS}")  # fmt: skip


def absent_gate(path):
    return (f"{GATE}={{class_path: {path}, init_args: {{num_experts: 4}}}}", f"{EXPERTS}={OURS}")


TRAINING = {
    "no such module": (
        (*FIT, *absent_gate("no_such_module.OwnGate")),
        "no_such_module.OwnGate cannot be imported: No module named 'no_such_module'; PYTHONPATH=",
    ),
    "no such gate": (
        (*FIT, *absent_gate("core_gates.TopKGat")),
        "core_gates.TopKGat cannot be imported: module 'core_gates' has no attribute 'TopKGat'",
    ),
    "NaN loss": (
        (
            *FIT,
            "--model.learning_rate",
            "1e30",
            "--trainer.gradient_clip_val",
            "null",
            "--model.warmup_steps",
            "0",
        ),
        "the loss of step [0-9]+ is (nan|inf)",
    ),
    "k > E": (
        (*FIT, *gate("TopKGate", num_experts=4, k=5)),
        "k must lie between 1 and num_experts=4, got 5",
    ),
    "coupled gate": (
        (*FIT, *gate("SwitchGate", num_experts=4)),
        "must not route by later tokens, as model.layers.0.mlp.gate (SwitchGate)",
    ),
    "gate without experts": (
        (*FIT, gate("TopKGate", num_experts=4)[0]),
        "need both gate and experts",
    ),
    "option of a gate that is not named": (
        (*FIT, f"{GATE}.num_experts=four"),
        "found 'num_experts=four'",
    ),
    "empty corpus": ((*FIT, "--data.corpus", "[void]"), "holds no text", {"void/a.py": ""}),
    "binary corpus": ((*FIT, "--data.corpus", "[a.bin]"), "is binary", {"a.bin": b"\0\1"}),
    "line without text": (
        (*FIT, "--data.corpus", "[a.jsonl]"),
        "a.jsonl, line 1 has no field 'text'",
        {"a.jsonl": '{"words": "a"}\n'},
    ),
    "no held-out file": ((*FIT, "--data.corpus", "[one.py]"), "and none for", {"one.py": "a" * 99}),
    "corpus shorter than the context": (
        (*FIT, "--data.context", "100000"),
        "give more text, or lower the context",
    ),
    "damaged tokenizer": (
        (*FIT, "--data.tokenizer", "tokenizer.json"),
        "cannot be read as a tokenizer",
        {"tokenizer.json": "{"},
    ),
    "damaged shard": (
        (*FIT[:-1], "bad"),
        "train.bin has 0 bytes, expected",
        {"bad": lambda path: with_empty_shards(path)},
    ),
    "vocabulary below that of the tokenizer": (
        (*FIT, "--model.model.init_args.vocab_size", "256"),
        "vocab_size is 256, but the tokenizer has 257 tokens",
    ),
    "resume with another corpus": (
        (
            "language",
            "fit",
            "--config",
            "small",
            "--resume",
            "--data.corpus",
            "[other]",
            "--data.cache_folder",
            "null",
        ),
        "was trained with other settings .*data.digest",
        {
            "other": lambda path: shutil.copytree(
                path.with_name("corpus"), path, ignore=shutil.ignore_patterns("f1*")
            )
        },
    ),
    "resume with another learning rate": (
        ("language", "fit", "--config", "small", "--resume", "--model.learning_rate", "0.1"),
        "model.learning_rate 0.005, now 0.1",
    ),
    "prepare without a place": (
        ("language", "prepare", "--config", "small", "--data.cache_folder", "null"),
        "give --data.cache_folder FOLDER",
    ),
}


def with_empty_shards(path):
    """Copy the memory maps of the corpus, and empty those of the training part."""
    shutil.copytree(path.with_name("cache"), path)
    for place in path.glob("*/train.bin"):
        place.write_bytes(b"")


OTHERS = {
    "temperature -1": (generate("--temperature", "-1"), "temperature is -1.0, expected"),
    "temperature NaN": (generate("--temperature", ".nan"), "temperature is nan, expected"),
    "top-p 2": (generate("--top_p", "2"), "top-p is 2.0, expected"),
    "top-k 0": (generate("--top_k", "0"), "top-k is 0, expected"),
    "no tokens": (generate("--max_tokens", "0"), "expected at least 1"),
    "prompt over the context": (generate(prompt="def " * 9), "has 37 tokens, expected 1 to 16"),
    "empty stop": (generate("--stop", ""), "stop string"),
    "no seeds": (("language", "evaluate", "--config", "small", "--seeds", "[]"), "--seeds is [], "),
    "negative seed": (
        ("language", "evaluate", "--config", "small", "--seeds", "[-1]"),
        "--seeds is [-1], expected one or more from 0",
    ),
    "no prompt": (("language", "generate", "--config", "small"), "give either --prompt"),
    "two prompts": (generate("--prompts", "p.txt"), "give either --prompt", {"p.txt": "a\n"}),
    "empty line": (
        ("language", "generate", "--config", "small", "--prompts", "p.txt"),
        "p.txt, line 2 is empty",
        {"p.txt": "a\n\nb\n"},
    ),
    "binary prompts": (
        ("language", "generate", "--config", "small", "--prompts", "p.txt"),
        "p.txt, line 1: byte 1 is not UTF-8",
        {"p.txt": b"\xff\xfe"},
    ),
    "no prompts": (
        ("language", "generate", "--config", "small", "--prompts", "none.txt"),
        "none.txt",
    ),
    "no model yet": (generate("--name", "none"), "has no model: run `gates language fit"),
    # Folders of models.
    "no folder": (
        ("language", "convert", "none", "--output", "out"),
        "none/config.json does not exist",
    ),
    "folder of another family": (
        ("language", "convert", "bert", "--output", "out"),
        "of type 'bert', expected llama",
        {"bert/config.json": '{"model_type": "bert"}'},
    ),
    "folder without weights": (
        generate("--weights", "empty"),
        "empty/config.json does not exist",
        {"empty": lambda path: path.mkdir()},
    ),
    "unknown numbers": (
        ("language", "convert", "none", "--output", "out", "--dtype", "int8"),
        "dtype: expected .*found 'int8'",
    ),
}


def damaged(path, model, *, whole=False):
    """Copy a model, and cut its weights; with ``whole`` weights, its other settings are none."""
    shutil.copytree(model, path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: None if whole else -100])
    (path / "generation_config.json").write_text("[]")


def test_faulty_trainings_are_one_line(trained, faulty_inputs):
    faulty_inputs(TRAINING, run=trained, folder=trained.folder)


def test_faulty_calls_are_one_line(trained, weights, faulty_inputs):
    of_model = {
        "damaged weights": (
            generate("--weights", "cut"),
            "model.safetensors is damaged",
            {"cut": lambda path: damaged(path, weights)},
        ),
        "damaged tokens of the end": (
            ("language", "convert", "ends", "--output", "out"),
            "generation_config.json holds no JSON object",
            {"ends": lambda path: damaged(path, weights, whole=True)},
        ),
        "output that exists": (
            ("language", "convert", str(weights), "--output", "there"),
            "there exists: choose another --output or add --overwrite_output",
            {"there": "mine"},
        ),
        "output that is the input": (
            ("language", "convert", str(weights), "--output", str(weights), "--overwrite_output"),
            "choose another --output",
        ),
    }
    faulty_inputs({**OTHERS, **of_model}, run=trained, folder=trained.folder)


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(trained):
    """What was saved before remains, and the line names the step."""
    words = ["--model.learning_rate", "1e30", "--checkpoint.every_n_steps", 1]
    words += ["--trainer.gradient_clip_val", "null", "--model.warmup_steps", 0]
    result = trained("language", "fit", "--config", "small", "--name", "diverged", *words)
    assert result.code == 2
    assert "the loss of step " in result.err
    folder = trained.folder / "runs/language/diverged"
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert not (folder / "weights").exists()


@pytest.mark.parametrize("verb", ["fit", "evaluate"])
def test_no_configuration_is_named_in_one_line(trained, verb):
    result = trained("language", verb)
    assert result.code == 2
    known = ", ".join(packaged_configs("language"))
    assert f"give --config NAME: one of {known}" in result.err
