"""The verbs that read a corpus: what they leave, and what they say."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from apps.language import byte_scores, generate
from apps.language.byte_scores import SAME_WINDOW, WHOLE_FILE, ModelFolder, headline, module_of
from apps.main import APPS
from harness.command.configfile import read_config
from harness.evidence import Row
from harness.experiment import Piece, Store
from harness.experiment.ship import ship
from harness.files.piece import read_record
from language.adaptive_counts import AdaptiveCounts
from language.corpus import Corpus, read_corpus
from language.counts import ByteCounts
from language.hf.model_folder import read_model
from language.scoring import bits_per_byte, ppmd_bits
from language.tokenizer import ByteTokenizer

KILLED = pytest.mark.costly("four processes, two of which are killed")
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[3] / "apps/language/configs").glob("*.yaml"))
    if "language.decoder.Decoder" in str(read_config(path))
]


def scores_of(trained, name="small"):
    return json.loads((trained.folder / f"runs/language/{name}/scores.json").read_text())


def test_prepare_accounts_for_the_corpus(trained):
    out = trained.succeed("prepare")
    corpus = read_corpus([trained.folder / "corpus"])
    for split in ("train", "validation", "test"):
        documents = corpus.part(split)
        size = sum(len(one.text.encode()) for one in documents)
        assert re.search(rf"^{split} +{len(documents)} +{size:,} ", out, re.MULTILINE)
    assert "left out: 1 duplicates, 0 links, 0 binary, 0 empty" in out
    folder = trained.folder / out.splitlines()[-1]
    assert (folder / "index.json").is_file()
    assert f"sha256 {'' or out.split('sha256 ')[1].split()[0]}" in out


def test_fit_leaves_a_model_folder_of_the_trained_weights(trained, weights):
    run = weights.parents[1]
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    model, tokenizer = read_model(weights)
    assert isinstance(tokenizer, ByteTokenizer)
    for name, value in model.state_dict().items():
        assert torch.equal(state[f"model.{name}"], value)
    record = read_record(weights)
    assert record.identity["method"] == "decoder"
    corpus = read_corpus([trained.folder / "corpus"])
    assert len(record.objects) == len(corpus.part("train"))
    module = module_of(record.settings)
    assert module.learning_rate == 5e-3
    assert {n: p.shape for n, p in module.model.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_the_decoder_is_scored_next_to_counts_and_ppmd(trained, weights):
    scores = scores_of(trained)
    values = {r["method"]: r for r in scores["rows"] if r["versus"] is None}
    adaptive = ["adaptive counts, same window", "adaptive counts, whole file"]
    assert list(values) == [*(f"order {n}" for n in range(6)), *adaptive, "PPMd", "decoder"]
    corpus = read_corpus([trained.folder / "corpus"])
    held = corpus.part("test")
    model, tokenizer = read_model(weights)
    bits = bits_per_byte(model, tokenizer, held, context=16)
    assert values["decoder"]["value"] == pytest.approx(bits[:, 0].sum() / bits[:, 1].sum())
    assert values["decoder"]["n"] == len(held) > 1
    assert values["decoder"]["low"] < values["decoder"]["value"] < values["decoder"]["high"]
    own = [ByteCounts.fit(corpus.part("train")).bits(one.text)[2, 8:] for one in held]
    assert values["order 2"]["value"] == pytest.approx(np.concatenate(own).mean())
    for name in adaptive:
        rival = AdaptiveCounts(
            ByteCounts.fit(corpus.part("train"), 7), tokenizer, 16, whole="whole" in name
        )
        own = rival.fit(corpus.part("validation")).bits(held)
        assert values[name]["value"] == pytest.approx(own[:, 0].sum() / own[:, 1].sum())
    packed = ppmd_bits(corpus.part("train"), held, [8] * len(held))
    assert values["PPMd"]["value"] == pytest.approx(packed[:, 0].sum() / packed[:, 1].sum())
    sizes = bits[:, 1]
    _, weighed, means = scores["notes"]
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    assert weighed.startswith(f"{len(held)} documents of unequal sizes n count as {effective:.1f}")
    assert means.endswith(f"decoder {(bits[:, 0] / sizes).mean():.3f}.")
    paired = {r["method"]: r for r in scores["rows"] if r["versus"] == "decoder"}
    assert paired.keys() == values.keys() - {"decoder"}
    gap = values["order 5"]["value"] - values["decoder"]["value"]
    assert paired["order 5"]["value"] == pytest.approx(gap)
    (bar,) = scores["bars"]
    assert (bar["bar"], bar["value"]) == (2.5, values["decoder"]["value"])
    assert bar["met"] is (bar["value"] <= 2.5)
    unbeaten = [
        f"{name} (told more)" if name in {adaptive[1], "PPMd"} else name
        for name, row in paired.items()
        if row["low"] <= 0
    ]
    assert scores["headline"].endswith(f"does not beat {' and '.join(unbeaten)}.")
    assert [one["role"] for one in scores["data"]] == ["train", "validation", "test", "tokenizer"]
    assert all(name in trained.evaluated for name in ("order 5", "PPMd", "decoder"))


def test_without_weights_the_row_is_the_command(trained):
    scores = scores_of(trained, "untrained")
    (row,) = (r for r in scores["rows"] if r["method"] == "decoder")
    command = "gates language fit --config small.yaml --name untrained"
    assert row["note"] == f"not trained: run `{command}`"
    assert row["value"] is None
    assert [bar["met"] for bar in scores["bars"]] == [None]
    assert {r["method"] for r in scores["rows"]} >= {"order 0", "order 5", "PPMd"}
    assert scores["headline"] == "The decoder is not trained."
    assert command in trained.untrained


@pytest.mark.fault("46 B1")
def test_without_the_library_of_ppmd_the_row_is_how_to_get_it(trained, weights, monkeypatch):
    known = {r["method"] for r in scores_of(trained)["rows"]}
    assert "PPMd" in known
    monkeypatch.setattr(byte_scores, "find_spec", lambda name: None)
    out = trained.succeed("evaluate", "--most_bits", 2.5)
    scores = scores_of(trained)
    row, *others = (r for r in scores["rows"] if r["method"] == "PPMd")
    assert ((row["value"], row["note"]), others) == ((None, "not measured: pip install pyppmd"), [])
    assert {r["method"] for r in scores["rows"]} == known
    assert "PPMd" not in scores["headline"]
    assert "pip install pyppmd" in out
    monkeypatch.undo()
    trained.succeed("evaluate", "--most_bits", 2.5)  # other tests read what it leaves
    assert {r["method"] for r in scores_of(trained)["rows"] if r["versus"]} >= {"PPMd"}


def test_evaluate_trains_to_the_bits_of_fit(trained, weights):
    trained.succeed("evaluate", "--name", "other", "--train")
    other = weights.parents[2] / "other/weights/decoder-s0"
    assert read_record(other).fingerprint == read_record(weights).fingerprint
    first, second = (load_file(place / "model.safetensors") for place in (weights, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert scores_of(trained, "other")["rows"] == scores_of(trained)["rows"]


def test_what_ships_is_half_as_large_and_scored(trained, weights, tmp_path, monkeypatch):
    (shipped,) = ship(weights.parents[1], kinds=["weights"], package=tmp_path, dtype=torch.bfloat16)
    assert json.loads((shipped / "config.json").read_text())["dtype"] == "bfloat16"
    card = (shipped / "README.md").read_text()
    assert f"{sum(w.numel() for w in read_model(shipped)[0].parameters()):,} weights in" in card
    state, exact = (load_file(place / "model.safetensors") for place in (shipped, weights))
    assert all(torch.equal(state[name], exact[name].bfloat16()) for name in exact)
    record = read_record(shipped)
    store = Store("weights", ModelFolder(), tmp_path / "none", tmp_path / "weights/small")
    piece = Piece("decoder", 0, settings=record.settings)
    loaded = module_of(piece.settings).model
    loaded.load_state_dict(store.load(piece))
    assert torch.equal(loaded.lm_head.weight, exact["model.embed_tokens.weight"].bfloat16().float())
    monkeypatch.setattr(generate, "shipped", lambda *_: tmp_path / "weights/small")
    words = ["--weights", "shipped", "--prompt", "def", "--max_tokens", 3]
    assert trained.succeed("generate", *words).startswith("def")


OWN_GATE = """
from core_gates import TopKGate


class OwnGate(TopKGate):
    def __init__(self, dim, num_experts=4, k=1):
        super().__init__(dim, num_experts=num_experts, k=k)
"""


def test_a_gate_of_your_own_without_types_is_trained_and_scored(trained, tmp_path, monkeypatch):
    (tmp_path / "own_gate.py").write_text(OWN_GATE)
    monkeypatch.syspath_prepend(tmp_path)
    experts = "{class_path: core_gates.StackedExperts, init_args: {hidden_dim: 8}}"
    gate = "{class_path: own_gate.OwnGate, init_args: {num_experts: 3}}"
    options = [f"--model.model.init_args.gate={gate}", f"--model.model.init_args.experts={experts}"]
    trained.succeed("fit", "--name", "own", *options, "--trainer.max_steps", 1)
    found = trained.folder / "runs/language/own/weights/decoder-s0/result.safetensors"
    assert load_file(found)["model.layers.0.mlp.gate.weight"].shape == (3, 16)
    trained.succeed("evaluate", "--name", "own", *options, "--trainer.max_steps", 1)
    assert "not trained" not in (trained.folder / "runs/language/own/scores.md").read_text()
    gates = json.loads((trained.folder / "runs/language/own/gates.json").read_text())["figures"]
    assert gates.keys() == {"block 1.gate", "block 2.gate"}
    assert 0 <= gates["block 2.gate"]["load_cv"] < 3**0.5
    result = trained(
        "language", "generate", "--config", "small", "--name", "own", "--prompt", "def"
    )
    assert result.code == 2
    assert "own/weights/decoder-s0 is of no family of transformers" in result.err


ONCE = """

class Once(OwnGate):
    built = 0

    def __init__(self, dim, num_experts=4):
        super().__init__(dim, num_experts)
        Once.built += 1
        if Once.built > 2:  # one for each layer
            raise ValueError("built once only")
"""


def test_a_model_that_cannot_be_built_again_is_refused_before_training(
    trained, tmp_path, monkeypatch
):
    (tmp_path / "single_gate.py").write_text(OWN_GATE + ONCE)
    monkeypatch.syspath_prepend(tmp_path)
    experts = "{class_path: core_gates.StackedExperts, init_args: {hidden_dim: 8}}"
    options = ["--model.model.init_args.gate", "single_gate.Once"]
    options += [f"--model.model.init_args.experts={experts}", "--root", tmp_path / "runs"]
    result = trained("language", "fit", "--config", "small", *options)
    assert result.code == 2
    assert "built once only" in result.err
    assert not [*tmp_path.glob("runs/**/last.ckpt")]


def test_the_report_names_the_documents(trained):
    out = trained.succeed("report")
    page = (trained.folder / out.splitlines()[-1]).read_text()
    assert "Where the decoder gains most and least over order 5" in page
    corpus = read_corpus([trained.folder / "corpus"])
    assert any(one.name in page for one in corpus.part("test"))


@pytest.mark.fault("language 7")
def test_a_seed_that_is_missing_is_named_with_a_command_that_trains_it(trained):
    root = ["--root", "seeds"]
    trained.succeed("fit", *root)
    trained.succeed("evaluate", *root, "--seeds", "[0,1]", "--most_bits", 8)
    scores = json.loads((trained.folder / "seeds/language/small/scores.json").read_text())
    (row,) = (r for r in scores["rows"] if r["method"] == "decoder" and r["versus"] is None)
    assert row["value"] > 0
    assert scores["headline"].startswith("The decoder needs ")
    assert scores["bars"][0]["value"] is None
    assert scores["bars"][0]["note"] == "not measured: seed 1 is not trained"
    note = scores["notes"][-1]
    assert note.startswith(
        "seed 1 is not trained: run `gates language evaluate --config small.yaml"
    )
    assert note.endswith("; scores are of seed 0 alone")
    words = note.split("`")[1].split()
    assert trained(*words[1:]).code == 0
    again = json.loads((trained.folder / "seeds/language/small/scores.json").read_text())
    assert len(again["notes"]) == len(scores["notes"]) - 1


@pytest.mark.fault("language 10")
@pytest.mark.fault("language 15")
def test_files_and_names_that_are_not_text_in_utf8(trained, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(trained.folder / "corpus", corpus)
    names = (os.fsdecode(b"\xff%d.py" % number) for number in range(99))
    name = next(one for one in names if Corpus.split(one) == "test")
    (corpus / name).write_text("def add(a, b):\n    return a + b\n" * 9)
    for number in range(3):
        (corpus / f"latin{number}.txt").write_bytes("Grüße".encode("latin-1"))
    options = ["--root", tmp_path, "--data.corpus", f"[{corpus}]", "--data.cache_folder"]
    options.append(tmp_path / "cache")
    said = "left out, as they are not text in UTF-8: 3 files\n"
    assert said in trained.succeed("fit", *options)
    trained.succeed("evaluate", *options)
    page = Path(trained.folder / trained.succeed("report", *options).splitlines()[-1])
    assert os.fsencode(name).decode(errors="backslashreplace") in page.read_text()
    assert said not in trained.succeed("fit", *options, "--overwrite")


@pytest.mark.slow  # daily: a killed training, and that `evaluate` trains to the bits of `fit`
def test_a_killed_evaluation_ends_with_the_same_figures(
    kill_and_resume, language_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(language_folder)
    options = ["--train", "--data.cache_folder", str(tmp_path / "cache")]
    kill_and_resume(
        ["language", "evaluate", "--config", "small", *options],
        app="language",
        compare=["*/*/result.*", "*/*/model.safetensors", "*/*/record.json", "scores.json"],
    )


@KILLED
def test_a_killed_training_ends_with_the_same_bits(
    kill_and_resume, language_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(language_folder)
    options = ["--checkpoint.every_n_steps", "1", "--data.cache_folder", str(tmp_path / "cache")]
    folder = kill_and_resume(
        ["language", "fit", "--config", "small", *options], app="language", rows=[3, 8]
    )
    model = "weights/decoder-s0/model.safetensors"
    whole = tmp_path / "whole/language/run"
    assert (folder / model).read_bytes() == (whole / model).read_bytes()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_packaged_configuration_trains(path, trained, tmp_path):
    options = ["--data.corpus", "[corpus]", "--data.cache_folder", tmp_path, "--data.batch_size", 2]
    limits = ["--trainer.max_steps", 1, "--trainer.limit_val_batches", 0]
    small = ["--data.context", 16, "--root", tmp_path]
    trained.succeed("fit", *options, *limits, *small, config=path.stem)
    found = tmp_path / f"language/{path.stem}/weights/decoder-s0/config.json"
    family = "qwen3_moe" if path.stem in ("experts", "moe") else "qwen3"
    assert json.loads(found.read_text())["model_type"] == family


def test_headlines():
    def said(decoder, **lows):
        rows = [Row("decoder", "test", "b", decoder), Row("order 0", "test", "b", 1.0)]
        rows += [
            Row(m.replace("_", " "), "test", "b", low + 1, low, 9, 3, "decoder")
            for m, low in lows.items()
        ]
        return headline(rows)

    assert said(
        2.0, order_0=0.1, order_1=0.0, **{SAME_WINDOW: -0.1, WHOLE_FILE: math.nan}, PPMd=-1
    ) == (
        "The decoder needs 2.00 bits per byte and does not beat order 1 and adaptive counts, same "
        "window and adaptive counts, whole file (told more) and PPMd (told more)."
    )
    assert said(1.5, order_0=0.1, PPMd=0.2).endswith(
        "1.50 bits per byte and beats all counts and PPMd."
    )
    assert said(1.5, order_0=0.1).endswith("1.50 bits per byte and beats all counts.")
    assert said(math.nan) == "The decoder is not trained."


def test_the_table_of_the_front_door_names_its_configurations():
    assert {path.stem for path in CONFIGS} == {"tiny", "base", "long", "moe", "gated", "experts"}
    assert set(APPS["language"].extras) == {"language", "pretrained"}
    assert yaml.safe_load(CONFIGS[0].read_text())["evaluate"] == {"most_bits": 2.0}
