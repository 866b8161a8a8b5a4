"""``gates language offload`` and its study, on a tiny mixture with random weights."""

import json
import re
from functools import partial

import pytest
import torch
import yaml

from apps.language.generate import models_in, shipped
from core_gates import StackedExperts, TopKGate
from language.decoder import Decoder
from language.hf.model_folder import write_model
from language.tokenizer import ByteTokenizer
from tests.apps.language.conftest import MODEL, Gates

SHORT = ("--corpus", "corpus", "--documents", 3, "--tokens", 24, "--prompt", 8)
QUICK = {"profiled": 2, "known": 2, "held_out": 3, "tokens": 24, "prompt": 8, "reads": [0.5, 2]}


@pytest.fixture(scope="module")
def gates(language_folder):
    """Commands in a folder with a mixture, a trace of it, and a study."""
    torch.manual_seed(0)
    sizes = MODEL | {"num_layers": 3, "context": 32}
    gate, experts = partial(TopKGate, num_experts=6, k=2), partial(StackedExperts, hidden_dim=8)
    model = Decoder(**sizes, gate=gate, experts=experts)
    for weight in model.parameters():
        weight.data *= 3  # so that routings differ
    write_model(language_folder / "mixture", model, ByteTokenizer())
    section = {
        "study": "offload",
        "model": "mixture",
        "corpus": ["corpus"],
        "budgets": [0.5, 0.8],
        **QUICK,
    }
    content = {"evaluate": {**section, "least_recall": 0.0, "most_loss": 5.0}}
    (language_folder / "study.yaml").write_text(yaml.safe_dump(content))
    found = Gates(language_folder)
    found.said = found.succeed("offload", "profile", "mixture", "trace.jsonl", *SHORT, config=None)
    return found


def test_a_profile_is_replayed_by_every_method(gates):
    assert "51 steps of 3 documents" in gates.said
    words = ("--budget", 0.6, "--compute", 0.001, "--link", 1e6)
    said = gates.succeed("offload", "replay", "trace.jsonl", *words, config=None)
    shown = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert "--unpack" in gates.said
    known = "on-demand static cross-layer path frequency ngram oracle auto mapped"
    assert shown == known.split()
    assert "simulated, 2 documents, 10 experts in memory; auto: " in said
    first, *steps = (gates.folder / "trace.jsonl").read_text().splitlines()
    for name, documents in (("known", (0,)), ("held", (1, 2))):
        own = [line for line in steps if json.loads(line)["document"] in documents]
        (gates.folder / f"{name}.jsonl").write_text("\n".join([first, *own]))
    replay = ("offload", "replay", "held.jsonl", "--budget", 0.7, "--profile")
    assert "all" in gates.succeed(*replay, "known.jsonl", config=None)


def test_text_is_the_same_whatever_is_guessed(gates):
    words = ("mixture", "--prompt", "def ", "--max_tokens", 6, "--temperature", 0)
    texts = set()
    for setup in (
        ("--budget", 1.0),
        ("--budget", 0.6, "--predictor", "cross-layer", "--width", 3),
        ("--budget", 0.6, "--predictor", "ngram", "--profile", "trace.jsonl"),
    ):
        said = gates.succeed("offload", "generate", *words, *setup, config=None)
        text, _, told = said.rpartition("\n" + said.splitlines()[-1])
        assert "MB read; of" in said.splitlines()[-1]
        del told
        texts.add(text)
    assert len(texts) == 1


def test_the_mixture_that_ships_continues_text(gates):
    words = ("--prompt", "import ", "--max_tokens", 4, "--budget", 0.25, "--predictor")
    said = gates.succeed("offload", "generate", "experts", *words, "cross-layer", config=None)
    assert said.startswith(("import ", "opening"))
    (folder,) = models_in(shipped().parent / "experts")
    assert (folder / "model.safetensors").stat().st_size <= 6e6


def test_a_benchmark_names_what_it_measures(gates):
    words = ("--tokens", 2, "--repeats", 2, "--budget", 0.6, "--policy", "static", "--predictor",
             "ngram-first", "--profile", "trace.jsonl")  # fmt: skip
    said = gates.succeed("offload", "bench", "mixture", *words, config=None)
    for name in ("mapped", "on-demand", "static", "ngram-first"):
        assert name in said


def test_a_study_measures_guesses_time_and_loss(gates):
    said = gates.succeed("evaluate", config="study")
    told = " ".join(said.split())
    assert "its router finds one layer early, and a table of the last four tokens: " in told
    for pairs in ("over all layers, the ", "after the first pair, "):
        assert pairs in told
    assert "is better. Auto is faster than on-demand in" in told
    assert re.search(r"budgets and links, and reads [\d.]+ to [\d.]+ times its bytes\.", told)
    folder = gates.folder / "runs/language/study"
    content = json.loads((folder / "scores.json").read_text())
    rows = {(r["task"], r["method"], r["metric"]): r for r in content["rows"] if not r["versus"]}
    for name in ("cross-layer", "ngram", "path", "frequency"):
        recalls = [
            rows[f"guesses, width {w}, over all layers", name, "recall"] for w in (2, 3, 4, 6)
        ]
        values = [one["value"] for one in recalls]
        assert values == sorted(values)
        assert 0 < values[0] < values[3] == 1
        assert recalls[0]["n"] == 3
    for budget in ("50%", "80%"):
        for read in ("0.5", "2"):
            task = f"{budget} of the experts, a read is {read} computations"
            walls = {m: r["value"] for (t, m, n), r in rows.items() if t == task}
            assert walls["oracle"] >= 1
            assert {"on-demand", "static", "auto", "mapped"} < walls.keys()
            assert {"on-demand, INT4", "static, INT4", "auto, INT4"} < walls.keys()
    assert rows["few bits", "int4", "loss_increase_nats"]["value"] < 1
    assert len(content["bars"]) == 5
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("result.*")}
    gates.succeed("evaluate", config="study")
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("result.*")}
    for words, line in (
        (("--profiled", 0), "--profiled is 0, --known 2, --held_out 3, --tokens 24"),
        (("--prompt", 24), "and --prompt 24: expected"),
        (("--budgets", "[2]"), "--budgets is [2.0], --reads [0.5, 2.0] and --unpack 0.1: expected"),
    ):
        wrong = gates("language", "evaluate", "--config", "study", *words)
        assert (wrong.code, line in wrong.err) == (2, True), wrong.err
    quick = gates.succeed("evaluate", "--quick", "--name", "quick", config="study")
    assert "bars" not in quick


def test_bad_inputs_are_one_line(gates):
    trace = (gates.folder / "trace.jsonl").read_text().splitlines()
    (gates.folder / "back.jsonl").write_text("\n".join([*trace[:3], trace[2]]))
    wrong = json.loads(trace[1])
    wrong["experts"][0][0][0] = 6
    (gates.folder / "wrong.jsonl").write_text("\n".join([trace[0], json.dumps(wrong)]))
    (gates.folder / "one.jsonl").write_text("\n".join(trace[:4]))
    replay = ("replay", "trace.jsonl", "--budget")
    made = ("generate", "mixture", "--prompt", "a")
    short = ("profile", "mixture", "new.jsonl", "--corpus", "study.yaml", "--prompt", 9)
    for words, line in (
        (("hum",), "offload has no verb 'hum': choose one of profile, replay, generate, bench"),
        (("replay", "back.jsonl"), "line 4: document 0, step 2 after document 0, step 2"),
        (("replay", "wrong.jsonl"), "line 2: there is no expert 6 of 6"),
        (("replay", "one.jsonl"), "has one document: give another file by --profile"),
        ((*replay, 0.5, "--profile", "trace.jsonl"), "trace.jsonl has 3 of 3 documents of trace"),
        (("replay", "none.jsonl"), "none.jsonl cannot be read"),
        ((*replay, 0.5, "--unpack", 1), "--unpack 1.0 is for few bits: give a --transfer"),
        ((*made, "--width", 3), "width 3 is for guesses: give a predictor, or leave it out"),
        ((*made, "--profile", "trace.jsonl"), "--profile is not used by --policy lru --predictor"),
        ((*replay, 2), "--budget is 2.0"),
        ((*replay, 0.5, "--compute", "1e400"), "--compute inf"),
        ((*replay, 0.2), "3 layers need 2 each: give at least"),
        (("generate", "mixture", "--prompt", ""), "--prompt is empty"),
        (("generate", "mixture", "--prompt", "a", "--budget", 0.1), "need 2 each: give at least"),
        (("generate", "corpus", "--prompt", "a"), "corpus holds no config.json"),
        (("generate", "mixture", "--prompt", "a", "--policy", "belady"), "policy: expected 'lru'"),
        (("bench", "mixture", "--repeats", 0), "--repeats 0: expected 1 or more"),
        (("profile", "mixture", "trace.jsonl"), "trace.jsonl exists"),
        (("profile", "mixture", "mixture", "--overwrite_output"), "mixture is a folder"),
        (("profile", "mixture", "new.jsonl", "--prompt", 0), "--prompt 0"),
        ((*short, "--tokens", 30), "no held-out document of the corpus has 30 tokens"),
        (("profile", "mixture", "new.jsonl", "--tokens", 64), "reads at most 32 tokens"),
    ):
        found = gates("language", "offload", *words)
        assert found.code == 2, words
        assert line in found.err
        assert len(found.err.strip().splitlines()) == 1
    assert not (gates.folder / "new.jsonl").exists()
    assert "profile    record which experts" in gates("language", "offload", "--help").out
