"""A SeqBoat of bytes from the command line: trained, and continuing prompts."""

import copy
import csv
import json

import pytest
import yaml

from apps.language.seqboat.bytes_study import RATES, headline
from harness.evidence import Row
from harness.files.piece import read_record
from language.seqboat.module import SeqBoatModule
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
    content["trainer"] = {"max_epochs": -1, "max_steps": 4, "gradient_clip_val": 1.0}
    content["evaluate"]["study"] = "bytes"
    del content["checkpoint"]
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


@pytest.mark.costly("trains two networks, twice over")
def test_the_study_differs_in_the_network_alone_and_resumes(reader, cut_off, monkeypatch):
    monkeypatch.setattr("apps.language.seqboat.bytes_study.RATES", RATES[1:2])
    words = ("language", "evaluate", "--config", "reader", "--seeds", "0", "--name")
    with monkeypatch.context():
        calls = cut_off(SeqBoatModule, "training_step", 11)  # of the first network, after 8 trials
        with pytest.raises(RuntimeError, match="cut off"):
            reader.succeed(*words, "killed")
    for name in ("killed", "whole"):
        reader.succeed(*words, name)
    assert len(calls) == 11 + 6 + 16
    first, second = (
        {p.relative_to(run): p.read_bytes() for p in run.glob("*/*/result.*")}
        for run in (reader.folder / "runs/language" / n for n in ("killed", "whole"))
    )
    assert first == second
    run = reader.folder / "runs/language/whole"
    settings = {
        n: {
            k: v
            for k, v in read_record(run / f"weights/{n}-s0").settings.items()
            if not k.startswith("model.model.")
        }
        for n in ("seqboat", "decoder")
    }
    assert settings["seqboat"] == settings["decoder"]
    content = json.loads((run / "scores.json").read_text())
    reader.succeed(*words[:1], "report", "--config", "reader", "--name", "whole")
    header, *lines = (run / "figures/text.csv").read_text().splitlines()
    assert header == "symbol,layer1,layer2"
    shown = "".join(next(csv.reader(lines[n : n + 1]))[0] for n in range(len(lines)))
    texts = [
        repr(p.read_text()[: len(lines)])[1:-1] for p in (reader.folder / "corpus").rglob("*.*")
    ]
    assert shown in texts
    compared = {r["method"] for r in content["rows"] if r["versus"] == "seqboat"}
    assert {"decoder", "adaptive counts, same window", "adaptive counts, whole file"} <= compared
    assert "needs a corpus" in reader.refuse(*words[:3], "small", "--study", "bytes")


def test_the_headline_says_who_needs_fewer_bits():
    def row(method, value, versus="", low=-1.0, high=1.0, p=1.0):
        return Row(method, "test", "bits per byte", value, low, high, 9, versus, p)

    rows = [row("seqboat", 2.5), row("decoder", 2.4), row("PPMd", 1.7), row("order 5", 2.9)]
    rows += [row("decoder", -0.1, "seqboat"), row("PPMd", -0.8, "seqboat", -0.9, -0.7, 0.01)]
    rows += [row("order 5", 0.4, "seqboat", 0.3, 0.5, 0.01)]
    assert headline(rows) == (
        "SeqBoat needs 2.500 bits per byte; fewer: PPMd (1.700, told more); more: order 5 (2.900); "
        "about as many: decoder (2.400)."
    )
    assert headline([]) == "SeqBoat is not trained."
