"""``evaluate --config scbench`` on few rows, and what its bars rest on."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from apps.language.scbench import reuse_study
from apps.language.scbench.cache_tour import cache_part
from apps.language.scbench.verdicts import PEAK, Verdict
from core_gates import GatesError
from harness.report.page import Page
from language.scbench.row import Row, Turn
from language.scbench.runner import STAGES
from language.tokenizer import ByteTokenizer
from tests.fixtures.gates_in_folder import GatesInFolder

ASKED = {"task": ["kv"], "rows": 3, "length": "200"}
TITLE = "retriever, kv (same form, other text)"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Commands in a folder with a study of the retriever, and its scores."""
    gates = GatesInFolder(tmp_path_factory.mktemp("study"))
    policies = ["streaming", "snapkv:window=8", "kivi:bits=4"]
    models = {"retriever": {**ASKED, "policy": policies, "keep": [0.5, 0.25]}}
    section = {"study": "scbench", "models": models, "least_full": 1.0, "most_later": 1.0,
               "most_lost": 0.0}  # fmt: skip
    (gates.folder / "small.yaml").write_text(yaml.safe_dump({"evaluate": section}))
    gates.said = gates.succeed("language", "evaluate", "--config", "small").out
    gates.scores = gates.folder / "runs/language/small/scores.json"
    return gates


def test_bars_are_those_of_the_retriever(evaluated):
    content = json.loads(evaluated.scores.read_text())
    met = {bar["name"]: bar["met"] for bar in content["bars"]}
    for mode in ("turns", "requests"):
        assert met[f"{TITLE}, {mode}: accuracy of full"]
        assert met[f"{TITLE}, {mode}: accuracy lost in 4 bits"]
        for keep in (0.5, 0.25):
            name = f"answers of streaming:keep={keep} other than those that it keeps"
            assert met[f"{TITLE}, {mode}: {name}"]
    assert [source["name"] for source in content["data"]] == ["retriever", "kv of retriever"]
    told = " ".join(evaluated.said.split())
    assert "3 rows cannot show which policies are below it." in told
    assert "of the others" not in told


def test_scores_are_taken_where_settings_agree(evaluated):
    made = {path: path.stat().st_mtime_ns for path in evaluated.folder.rglob("record.json")}
    said = evaluated.succeed("language", "evaluate", "--config", "small").out
    assert "making" not in said
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert len([path for path in made if path.parts[-3] == "scores"]) == 2


def test_a_package_that_is_not_installed_leaves_its_model_out(evaluated, monkeypatch):
    def refuse(place, model):
        raise GatesError("smollm2 is in a package")

    monkeypatch.setattr(reuse_study, "model_folder", refuse)
    models = json.dumps({"smollm2": ASKED})
    command = ("language", "evaluate", "--config", "small", "--models", models, "--name", "none")
    assert "nothing was scored" in evaluated.refuse(*command)


def verdict_of(full, options=(), answers="{}"):
    """What is said of questions of one row each, of which full answers some."""
    verdict, asked = Verdict.__new__(Verdict), "a"
    if options == "listed":
        asked, options = "a\n(A) b\n(B) c", ()
    turns = [(Turn(asked, answers.format(n, n % 2), options),) for n in range(len(full))]
    verdict.contexts = [Row("kv", n, "c", turn) for n, turn in enumerate(turns)]
    half = np.array(full, dtype=float)[:, None] * (np.arange(len(full)) % 2)[:, None]
    size = {"held_bytes": np.ones(len(full)), "full_bytes": np.full(len(full), 4.0)}
    size |= {"truncated": np.zeros(len(full)), "tokens.prefill": np.full(len(full), 30.0)}
    verdict.figures = {"full": {"score": np.array(full, dtype=float)[:, None], **size},
                       "other": {"score": half, **size}}  # fmt: skip
    verdict.title, verdict.asking = "x", SimpleNamespace(name="")
    return verdict


@pytest.mark.parametrize(
    ("right", "options", "ranked"),
    [(40, (), True), (4, (), False), (14, (), False), (20, (), True), (20, ("a", "b"), False),
     (20, "listed", False), (38, ("a", "b"), True)],
)  # fmt: skip
def test_what_full_rarely_answers_is_not_ranked(right, options, ranked):
    verdict = verdict_of([1] * right + [0] * (40 - right), options)
    assert verdict.ranked == ranked
    assert any(row.versus for row in verdict.accuracy) == ranked
    assert ("nothing is ranked" in verdict.sentence()) == (not ranked)
    if ranked:
        assert "1 policies 1 are surely below it." in verdict.sentence()


@pytest.mark.parametrize("right", [0, 1])
def test_contexts_that_do_not_fit_are_said_with_what_full_answers(right):
    verdict = verdict_of([right] * 40)
    assert "left out" not in verdict.sentence()
    verdict.figures["full"]["truncated"][3:] = 10
    assert "] of contexts whose middle was left out, 24% of their tokens" in verdict.sentence()


def test_one_row_is_not_ranked():
    verdict = verdict_of([1])
    assert not verdict.ranked
    assert verdict.sentence() == "x: nothing is ranked, as one row has no interval: ask more."


@pytest.mark.parametrize(("right", "ranked"), [(20, False), (38, True)])
def test_answers_that_repeat_can_be_guessed(right, ranked):
    verdict = verdict_of([1] * right + [0] * (40 - right), answers="({1})")
    assert verdict.chance == 0.5
    assert verdict.ranked == ranked
    assert verdict_of([1] * 40, answers="a").chance == 1
    assert not verdict_of([1] * 40, answers="a").ranked


@pytest.mark.parametrize(("rows", "shows"), [(2, False), (5, False), (6, True)])
def test_few_rows_recommend_nothing(rows, shows):
    said = verdict_of([1] * rows).sentence()
    assert (f"{rows} rows cannot show which policies are below it." in said) is not shows
    assert ("of 1 policies" in said) is shows
    assert not any(row.significant for row in verdict_of([1] * 5).accuracy if row.versus)


def test_memory_that_was_not_sampled_is_left_out():
    verdict = verdict_of([1] * 4)
    for of, peak in zip(verdict.figures.values(), (0.0, 6e6), strict=True):
        stages = {f"{kind}.{name}": np.ones(4) for kind in ("seconds", "tokens") for name in STAGES}
        of |= {**stages, "read": np.ones(4), "peak_bytes": np.array([0, 0, peak, peak])}
    shown = [(row.method, row.value) for row in verdict.rows() if row.metric == PEAK]
    assert shown == [("other", 6.0)]


@pytest.mark.costly("a causal language model is opened, and texts of the standard library are read")
def test_loss_after_compression_is_paired_with_full(evaluated):
    folder = evaluated.folder / "random"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=16,
                         num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    ByteTokenizer().save(folder)
    asked = {"length": "731", "mode": ["turns"], "policy": ["streaming"], "new_tokens": 3}
    models = json.dumps({"random": ASKED | asked})
    texts = ("--texts", 2, "--tokens", 60, "--prompt", 40, "--window", 20)
    bars = ("--least_without", -9, "--most_with", 9)
    evaluated.succeed("language", "evaluate", "--config", "small", "--models", models, *texts,
                      *bars, "--name", "loss")  # fmt: skip
    content = json.loads((evaluated.scores.parents[1] / "loss/scores.json").read_text())
    rows = [row for row in content["rows"] if row["task"] == "random, loss after compression"]
    value = {(row["method"], row["versus"]): row["value"] for row in rows}
    assert {row["n"] for row in rows} == {2}
    for sinks in (0, 4):
        name = f"streaming, {sinks} sinks"
        assert value[name, "full"] == pytest.approx(value[name, None] - value["full", None])
    assert [bar["sense"] for bar in content["bars"]] == [">=", "<="]


def test_the_tour_asks_one_context_five_times():
    part = cache_part()
    whole = float(re.fullmatch(r"full 5 \((4\.\d\d) MB\)", part.row.baseline)[1])
    few = float(re.search(r"int4 5 \((\S+) MB\)", part.row.value)[1])
    assert 0.2 < few / whole < 0.22
    assert part.row.verdict.startswith("int4 as full")
    part.draw(page := Page("Tour").section("caches"))
    assert "2,048 symbols" in page.html()
