"""A SeqBoat of bytes from the command line: trained, and continuing prompts."""

import copy

import pytest
import yaml

from tests.apps.language.conftest import write_corpus
from tests.apps.language.seqboat.conftest import CONFIG


@pytest.fixture
def reader(gates):
    """``gates`` in a folder with a corpus, speech and the configuration ``reader``."""
    content = copy.deepcopy(CONFIG)
    content["model"]["model"]["init_args"] |= {
        "front": {
            "class_path": "language.seqboat.front_ends.SymbolEmbedding",
            "init_args": {"dim": 8, "vocab_size": 257},
        },
        "outputs": 257, "causal": True,
    }  # fmt: skip
    content["data"] = {
        "class_path": "language.data.LanguageDataModule",
        "init_args": {
            "corpus": ["corpus"],
            "context": 16,
            "batch_size": 8,
            "cache_folder": "cache",
        },
    }
    content["trainer"] = {"max_epochs": 1, "max_steps": 4, "gradient_clip_val": 1.0}
    del content["checkpoint"], content["evaluate"]
    write_corpus(gates.folder / "corpus")
    (gates.folder / "reader.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return gates


def test_prompts_are_continued_as_by_themselves(reader):
    words = ("language", "generate", "--max_tokens", "9", "--config")
    reader.succeed("language", "fit", "--config", "reader")
    prompts = ["def mean(", "a"]
    (reader.folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    together = reader.succeed(*words, "reader", "--prompts", "prompts.txt").out
    weights = "runs/language/reader/weights/configured-s0"
    for number, prompt in enumerate(prompts, 1):
        alone = reader.succeed(*words, "small", "--prompt", prompt, "--weights", weights).out
        assert f"[{number}] {alone}" in together
        assert alone.startswith(prompt)
    reader.succeed("language", "fit", "--config", "small")
    for faulty in ((), ("--weights", "runs/language/small/weights/configured-s0")):
        assert "continues no bytes" in reader.refuse(*words, "small", "--prompt", "a", *faulty)
    assert "reader" not in reader.refuse("language", "generate", "--prompt", "a", "--name", "none")
