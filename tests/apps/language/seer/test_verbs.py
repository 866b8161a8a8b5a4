"""``gates language distill``, ``generate --gates``, ``evaluate`` of block gates, on small files."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteConfig

from apps.language.diagnose import beginnings
from apps.language.generate import models_in, shipped
from apps.language.seer import distill
from apps.language.seer.calibrate import calibration_tokens
from apps.language.seer.distill import digest_of
from apps.language.seer.prompt_losses import RULES, prefill
from apps.language.seer.study import medians
from apps.language.seer.tour import GATES, block_part
from harness.figures import read_metrics
from harness.report.page import Page
from language import attach_block_gates, attach_output_gate, save_gates
from language.corpus import Document, read_corpus
from language.hf.gate_file import read_tensors
from language.hf.pretrained import open_pretrained
from language.seer.attach import choose_blocks
from language.seer.attention import attend_to_all
from language.seer.block_files import load_block_gates
from language.seer.budgets import load_budgets
from language.seer.distillation import BlockGateModule
from language.seer.speed import WAYS, write_speed
from language.tokenizer import ByteTokenizer

SIZES = ("--block_size", 4, "--context", 16, "--sequences", 6, "--batch_size", 2, "--steps", 30)
CORPUS = ("--corpus", "corpus", "--learning_rate", 0.01)
STEP = "training_step"
STUDY = {
    "study": "blocks",
    "kinds": ["prefill", "decode"], "block_size": 4, "context": 16, "sequences": 6, "steps": 30,
    "batch_size": 2, "learning_rate": 0.01, "held_out": [3, 2, 2], "fractions": [0.7, 1.0, 0.7],
    "lengths": [16, 16, 24], "calibration": 2, "most_loss": [9.0],
    "most_over_rules_with_budgets": [None, 0.1], "least_speed": [None, None, 0.001],
    "corpus": ["corpus"], "seeds": [0, 1],
}  # fmt: skip


@pytest.fixture
def study(trained, weights):
    """Write the configuration ``study``, of a model that reads longer texts; return its name."""
    model = shutil.copytree(weights, trained.folder / "longer", dirs_exist_ok=True)
    facts = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**facts, "max_position_embeddings": 24}))
    content = {"evaluate": {**STUDY, "model": str(model)}}
    (trained.folder / "study.yaml").write_text(yaml.safe_dump(content))
    return "study"


@pytest.fixture(scope="module")
def distilled(trained, weights):
    """Files of gates of the trained model, by kind, and what the command said."""
    found = {}
    for kind in ("prefill", "decode"):
        words = ("--model", weights, "--kind", kind, "--name", kind, *SIZES, *CORPUS)
        said = trained.succeed("distill", *words, config=None)
        path = trained.folder / said.splitlines()[-1]
        found[kind] = path, said
    return found


def generate(trained, *words, prompt="def"):
    return trained.succeed(
        "generate", "--prompt", prompt, "--temperature", 0, "--max_tokens", 8, *words
    )


def test_gates_are_distilled_once_and_kept_alone(distilled, trained, weights):
    path, said = distilled["prefill"]
    assert "records of 6 sequences: 0 MB in" in said
    assert path.stat().st_size < 10_000
    facts = json.loads((path.parent / "record.json").read_text())
    assert len(facts["objects"]) == 6
    before, after = facts["facts"]["row_kl_before"], facts["facts"]["row_kl"]
    assert list(after) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(after[name] < before[name] for name in after)
    logged = read_metrics(path.parents[2] / "training-prefill-s0/metrics.csv")
    assert logged.keys() == {"train/loss", "train/row_kl", *(f"train/row_kl/{n}" for n in after)}
    assert logged["train/loss"].steps.tolist() == [9, 19, 29]
    assert "--weights" in (path.parent / "README.md").read_text()
    assert json.loads(read_tensors(path)[0]["options"])["context"] == 16
    before = path.stat().st_mtime_ns
    words = ("--model", weights, "--kind", "prefill", "--name", "prefill", *SIZES, *CORPUS)
    again = trained.succeed("distill", *words, config=None)
    assert "missing" not in again
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("at", ["record", "step"])
def test_what_is_cut_off_anywhere_ends_with_the_same_bits(
    refuses, at, distilled, trained, weights, cut_off
):
    """Of records, those that are whole are kept; a training continues inside an epoch."""
    words = ("--model", weights, "--kind", "decode", "--name", f"cut-{at}", *SIZES, *CORPUS)
    place = {"record": (distill, "record_sequence", 4), "step": (BlockGateModule, STEP, 17)}
    calls = cut_off(*place[at])
    refuses(RuntimeError, ("cut off", lambda: trained.succeed("distill", *words, config=None)))
    said = trained.succeed("distill", *words, config=None)
    assert len(calls) == 1 + (6 if at == "record" else 30)
    path = trained.folder / said.splitlines()[-1]
    found, expected = load_file(path), load_file(distilled["decode"][0])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    logs = [
        one.parents[2] / "training-decode-s0/metrics.csv" for one in (path, distilled["decode"][0])
    ]
    assert logs[0].read_bytes() == logs[1].read_bytes()


def test_where_all_is_read_the_text_is_that_of_the_decoder(distilled, trained):
    plain = generate(trained).splitlines()
    for kind, (path, _) in distilled.items():
        said = generate(trained, "--gates", path, "--sparse", "token_budget=16").splitlines()
        assert said[: len(plain)] == plain
        assert said[-1].endswith(" tokens/s")
        means = [line for line in said if line.startswith("blocks read, by layer: 1.00 1.00")]
        assert len(means) == 1, kind
    none = generate(trained, "--gates", distilled["prefill"][0], "--sparse", "k=1", prompt="")
    assert none.splitlines()[-2].startswith("blocks read: all; gates for prefill choose")


def test_blocks_are_chosen_from_the_length_on_that_was_timed(distilled, trained, weights):
    base = AutoModelForCausalLM.from_pretrained(weights)
    words = ("--gates", distilled["decode"][0], "--sparse", "k=3", "--weights", weights)
    said = generate(trained, *words, prompt="def add_1(a):").splitlines()
    assert said[-3] == "below 4,096 tokens, a cache is read whole"
    assert said[-2].endswith("1.00 1.00; mean 1.000")
    slow, fast = {"stock": 2.0, "everything": 2.0, "gates": 3.0}, dict.fromkeys(WAYS, 2.0)
    times = {8: {**slow, "gates": 1.0}, 14: slow, 15: {**fast, "gates": 1.0}}
    path, start = write_speed(trained.folder / "runs/language/cache", base, times)
    assert start == 15
    said = generate(trained, *words, prompt="def add_1(a):").splitlines()
    assert said[-3] == "below 15 tokens, a cache is read whole"
    assert said[-2].endswith("0.75 0.75; mean 0.750")  # 3 of 4 blocks, until the context is full
    path.write_text("{")
    result = trained("language", "generate", "--config", "small", "--prompt", "d", *words)
    assert (result.code, "run `gates language diagnose --speed` again" in result.err) == (2, True)
    path.unlink()


def calibrate(trained, weights, *words):
    sizes = ("--context", 16, "--documents", 3, "--corpus", "corpus")
    return trained.succeed("calibrate", "--model", weights, *sizes, *words, config=None)


def test_budgets_are_calibrated_to_the_density_and_read_by_generate(distilled, trained, weights):
    path = distilled["prefill"][0]
    said = calibrate(trained, weights, "--gates", path, "--density", 0.7).splitlines()
    read, made = (
        re.fullmatch(r"4 heads read (\d to \d) of 4 blocks \(0.7 of all\): .*", said[-2]),
        said[-1],
    )
    assert read
    assert made.endswith(f"decoder-s0-{path.parent.name}-gates/budgets.safetensors")
    model = AutoModelForCausalLM.from_pretrained(weights)
    gates = load_block_gates(model, path)
    budgets = load_budgets(model, trained.folder / made)
    choose_blocks(model, budgets)
    model(torch.arange(16)[None])
    density = sum(gate.density for gate in gates.values()) / len(gates)
    assert 0.6 < density < 0.7 + 1e-6  # to a block of one of four heads
    words = ("--weights", weights, "--gates", path, "--sparse", f"budgets={made}")
    shown = generate(trained, *words, prompt="def add_1(a):").splitlines()[-2]
    assert shown.startswith("blocks read, by layer: ")


def test_budgets_are_calibrated_on_training_documents_that_gates_have_not_learned_from(
    distilled, weights, trained, monkeypatch
):
    monkeypatch.chdir(trained.folder)
    tokens = calibration_tokens(open_pretrained(weights, "cache"), ["corpus"], 16, 2)
    learned = json.loads((distilled["prefill"][0].parent / "record.json").read_text())["objects"]
    digests = {digest_of(ids) for ids in tokens}
    assert len(digests) == 2
    assert not digests & set(learned)
    held = read_corpus(["corpus"]).part("test")
    _, tested = beginnings(open_pretrained(weights, "cache"), held, 16, 99)
    assert not digests & {digest_of(ids) for ids in tested}


def test_without_gates_heads_choose_by_what_needs_no_training(trained, weights):
    said = calibrate(trained, weights, "--block_size", 4, "--density", 0.7, "--name", "none")
    assert re.search(r"blocks \(0.7 of all\): \d by window, \d by mean-pool\n", said)
    model = AutoModelForCausalLM.from_pretrained(weights)
    attach_block_gates(model, block_size=4)
    choose_blocks(model, load_budgets(model, trained.folder / said.splitlines()[-1]))
    assert model(torch.arange(16)[None]).logits.isfinite().all()


@pytest.mark.costly("gates of two kinds and two seeds are trained, and read 24 tokens at most")
def test_gates_with_budgets_are_compared_with_rivals(trained, study):
    said = trained.succeed("evaluate", config=study)
    folder = trained.folder / "runs/language/study"
    content = json.loads((folder / "scores.json").read_text())
    rows = {(r["task"], r["method"], r["metric"], r["versus"]): r for r in content["rows"]}
    assert content["seeds"] == [0, 1]
    alone = {"sink-window", "sink-mean-pool", "vertical-slash", "gate", RULES}
    references, losses = {"oracle-by-sum", "gate, uniform"}, {}
    for length, fraction, documents in (("16", "70%", 3), ("16", "100%", 2), ("24", "70%", 2)):
        task = f"prompts of {length} tokens, {fraction} of the blocks"
        methods = alone | (references if length == "16" else set())
        figures = {
            metric: {m: r for (t, m, n, v), r in rows.items() if (t, n, v) == (task, metric, None)}
            for metric in ("loss_increase_nats", "cpu_seconds", "attention_mass")
        }
        mass, seconds = figures["attention_mass"], figures["cpu_seconds"]
        assert mass.keys() == (methods if length == "16" else set())
        assert all(0 < row["value"] < 1 + 1e-6 for row in mass.values())
        assert seconds.keys() == {"dense"} | methods - {"oracle-by-sum"}
        assert all(0 < row["value"] < 5 for row in seconds.values())
        losses[task] = figures["loss_increase_nats"]
        assert losses[task].keys() == methods
        assert {row["n"] for row in losses[task].values()} == {documents}
        for method in methods - {"gate"}:
            gap, own = rows[task, method, "loss_increase_nats", "gate"], losses[task]["gate"]
            expected = losses[task][method]["value"] - own["value"]
            assert gap["value"] == pytest.approx(expected, abs=1e-6)
        gap = rows[task, RULES, "loss_increase_nats", "gate"]["value"]
        assert f"{length} tokens, gates with budgets lose {own['value']:.3f} nats [" in said
        assert f"next to {RULES} {-gap:+.3f} [" in content["headline"]
        if fraction == "100%":  # all is read
            assert all(row["value"] == pytest.approx(1, abs=1e-6) for row in mass.values())
        values = [abs(row["value"]) for row in losses[task].values()]
        assert max(values) < 1e-5 if fraction == "100%" else max(values) > 1e-5
    assert [(bar["name"], bar["met"], bar["bar"]) for bar in content["bars"]] == [
        ("prompts of 16 tokens, 70% of the blocks: nats over dense", True, 9.0),
        (
            "prompts of 16 tokens, 100% of the blocks: nats over rules with budgets, upper end of"
            " the interval",
            True,
            0.1,
        ),
        ("prompts of 24 tokens, 70% of the blocks: as fast as the model as it comes", True, 0.001),
    ]
    drawn = (folder / "figures/loss-over-seconds.csv").read_text()
    for panel in ("16 tokens: ● 70%, ■ 100%", "24 tokens: ● 70%"):
        points = [row for row in drawn.splitlines() if panel in row and ",point," in row]
        assert {method for method in alone if any(method in row for row in points)} == alone
    assert "missing" not in trained.succeed("evaluate", config=study)


def test_seconds_are_medians_of_those_that_are_drawn():
    scores = medians([5.0, 1.0, 9.0, 2.0])
    weights = np.array([[1.0, 1, 1, 1], [1, 0, 1, 1], [0, 3, 1, 1], [0, 0, 0, 2]])
    assert scores(weights)["cpu_seconds"].tolist() == [2.0, 5.0, 1.0, 2.0]


def test_losses_are_those_of_a_model_that_scales_its_logits():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "logits_scaling": 0.1}
    model = AutoModelForCausalLM.from_config(GraniteConfig(**sizes, **heads)).eval()
    tokens = torch.arange(1, 13)
    with torch.no_grad():
        expected = float(model(tokens[None], labels=tokens[None]).loss)
    assert prefill(model, tokens)[0] == pytest.approx(expected)
    attach_block_gates(model, block_size=4)
    assert prefill(model, tokens, lambda _, seen: attend_to_all(seen))[0] == pytest.approx(expected)


def test_faulty_calls_are_one_line(distilled, trained, weights, study, faulty_inputs):
    prefill, decode = (str(path) for path, _ in distilled.values())
    model = AutoModelForCausalLM.from_pretrained(weights)
    attach_output_gate(model)
    output = str(save_gates(model, trained.folder / "output.safetensors"))
    other = str(shutil.copytree(weights, trained.folder / "other-base"))
    model = AutoModelForCausalLM.from_pretrained(weights)
    model.model.embed_tokens.weight.data.mul_(2)
    model.save_pretrained(other)
    tuned = str(shutil.copytree(weights, trained.folder / "tuned"))
    model = AutoModelForCausalLM.from_pretrained(weights)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    model.save_pretrained(tuned)

    def faulty(*words, name="faulty", model=weights):
        place = ("--model", str(model), "--name", name)
        return ("language", "distill", *place, *map(str, (*SIZES, *CORPUS, *words)))

    def gated(sparse, path=prefill, *words):
        given = ("language", "generate", "--config", "small", "--prompt", "def", *words)
        return (*given, "--gates", path, "--sparse", sparse)

    def calibrated(*words):
        sizes = ("--context", 16, "--documents", 3, "--corpus", "corpus", "--name", "faulty")
        return ("language", "calibrate", "--model", str(weights), *map(str, (*sizes, *words)))

    budgets = trained.succeed(
        *("calibrate", "--model", weights, "--context", 16, "--documents", 3, "--corpus", "corpus"),
        *("--block_size", 8, "--density", 0.8, "--name", "eight"), config=None,
    ).splitlines()[-1]  # fmt: skip

    def timed(*words):
        return ("language", "diagnose", "--model", str(weights), "--speed", "true", *words)

    faults = {
        "timed without gates": (timed(), "for decoding: give their file by --gates"),
        "timed with gates for prompts": (
            timed("--gates", prefill), "holds gates for prefill, expected gates for decode"),
        "timed in a short context": (
            timed("--gates", decode), "reads at most 16 tokens, 256 are asked for"),
        "budgets of blocks of 8": (
            gated(f"budgets={budgets}"), "budgets are in blocks of 8, the gates have 4"),
        "budgets of another model": (
            gated(f"budgets={budgets}", prefill, "--weights", other), "holds gates of the base"),
        "gates as budgets": (gated(f"budgets={prefill}"), "kind 'block', expected 'budgets'"),
        "density 2": (
            calibrated("--density", 2, "--block_size", 4), "the density is 2.0, expected 0.4"),
        "density 0": (
            calibrated("--density", 0, "--block_size", 4), "expected 0.4, one block of 4 a row"),
        "calibrated for decoding": (
            calibrated("--gates", decode), "gates for decode in blocks of 4, expected prefill"),
        "calibrated with another block": (
            calibrated("--gates", prefill, "--block_size", 8), "expected prefill and blocks of 8"),
        "one block": (calibrated("--block_size", 9), "expected at least 1 and two blocks of 9"),
        "too many documents": (
            calibrated("--block_size", 4, "--density", 0.7, "--documents", 99),
            "training documents have 16 tokens, --documents is 99"),
        "block 0": (faulty("--block_size", 0), "--block_size is 0, expected at least 1"),
        "block too large": (faulty("--block_size", 9), "less than two blocks of 9"),
        "rate 0": (faulty("--learning_rate", 0), "expected a positive number"),
        "kind": (faulty("--kind", "both"), "kind: expected"),
        "context": (faulty("--context", 99), "reads at most 16 tokens, 99 are asked for"),
        "sequences": (faulty("--sequences", 99), "of [0-9]+ training documents have 16 tokens"),
        "no model": (faulty(model="none"), "none holds no config.json"),
        "resume with other sequences": (
            faulty("--kind", "prefill", "--sequences", 5, name="prefill"),
            "prefill-s0 was made with other settings .*sequences",
        ),
        "resume with other weights": (
            faulty("--kind", "prefill", name="prefill", model=tuned), "with other weights"),
        "gates of other weights": (
            gated("k=1", prefill, "--weights", tuned), "with other weights"),
        "gates of another base": (
            gated("k=1", prefill, "--weights", other), "holds gates of the base model"),
        "a folder of gates": (gated("k=1", "corpus"), "corpus is a folder, expected a file: name"),
        "gates of another kind": (gated("k=1", output), "kind 'output', expected 'block'"),
        "no rule": (gated("blocks=2"), "expected one of token_budget, k"),
        "two rules": (gated("k=1,p=0.5"), "k=1,p=0.5: expected a whole number .*give one RULE"),
        "budget below a block": (gated("token_budget=3"), "at least one block of 4, got 3"),
        "a budget below the blocks that are always read": (
            gated("k=2", decode), "sinks=1 and recent=2 are 1 more than the blocks of k=2: raise"),
        "top-p 2": (gated("p=2", decode), "p must lie in .0, 1., got 2.0"),
        "gates without a rule": (gated("k=1")[:-2], "belong together"),
        "prompt over the context": (
            (*gated("k=1")[:5], "def " * 9, *gated("k=1")[6:]), "expected 1 to 16"),
        "a seed below 0": (faulty("--seed", -1), "seeds are -1, expected some from 0 on"),
        "no kinds": (
            ("language", "evaluate", "--config", study, "--kinds", "[]"), "--kinds is empty"),
        "no fractions": (
            ("language", "evaluate", "--config", study, "--fractions", "[]"),
            r"--fractions \[\] and --calibration 2, expected .* from 16"),
        "fewer lengths than fractions": (
            ("language", "evaluate", "--config", study, "--lengths", "[16]"),
            r"--lengths \[16\], --fractions \[0.7, 1.0, 0.7\] .*, equally many"),
        "a prompt shorter than those of the gates": (
            ("language", "evaluate", "--config", study, "--lengths", "[16, 16, 8]"),
            r"--lengths \[16, 16, 8\], .* lengths from 16,"),
        "fewer blocks than one a row": (
            ("language", "evaluate", "--config", study, "--fractions", "[0.3, 1, 1]"),
            "the density is 0.3, expected 0.4"),
        "no held-out": (
            ("language", "evaluate", "--config", study, "--held_out", "[3, 0, 2]"),
            r"--held_out is \[3, 0, 2\]"),
        "too few held out": (
            ("language", "evaluate", "--config", study, "--held_out", "[999, 2, 2]"),
            "test documents have 16 tokens, --held_out is 999"),
    }  # fmt: skip
    faulty_inputs(faults, run=trained, folder=trained.folder)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_recorded(
    trained, weights, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    words = ("--model", weights, "--name", "full", *SIZES, *CORPUS)
    result = trained("language", "distill", *words)
    assert result.code == 2
    assert "has 0 MB free, the records of 6 sequences need" in result.err
    assert not (trained.folder / "runs/language/full/records").exists()


def test_the_tour_shows_the_map_of_the_gates_that_ship():
    weights = models_in(shipped())[0]
    texts = [Document(str(n), f"def f{n}(a):\n    return a + {n}\n\n\n" * 12) for n in range(2)]
    part = block_part(weights, shipped().parent / GATES, ByteTokenizer(), texts)
    value, baseline = part.row.value, part.row.baseline
    assert 0.5 < float(value.split()[0]) < 1
    assert baseline.startswith("oracle 0.")
    assert part.row.verdict == "better than random, as mean keys are"
    page = Page("Tour").section("Language")
    part.draw(page)
    maps = [axes.images[0].get_array() for axes in part.figure.axes]
    assert [m.shape for m in maps] == [(16, 16), (16, 16)]
    assert all(abs(row.sum() - 1) < 1e-4 for m in maps for row in m)
    assert "block of keys" in part.figure.axes[0].get_xlabel()
