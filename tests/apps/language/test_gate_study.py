"""``evaluate --gates``: decoders that differ in the gate of their attention alone."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from apps.language.byte_scores import module_of
from apps.language.gate_study import gate_options
from core_gates.errors import GatesError
from harness.command.configfile import read_config
from language.gated.diagnostics import attention_diagnostics, decoder_diagnostics
from language.hf.model_folder import read_model
from language.hf.pretrained import open_pretrained
from language.seer.sparse_decoder import SHIPPED

CONFIGS = Path(__file__).parents[3] / "apps/language/configs"
STEP = "model.layers.1.self_attn.attend.routing.step"
SHORT = ("--gates", "[none, G1 headwise, G2 elementwise]", "--seeds", "[0, 1]", "--name", "places",
         "--trainer.max_steps", 3, "--trainer.val_check_interval", 3)  # fmt: skip


def rows_of(folder, name="places"):
    content = json.loads((folder / f"runs/language/{name}/scores.json").read_text())
    return content, {(r["method"], r["metric"], r["versus"]): r for r in content["rows"]}


def test_places_are_compared_with_the_first(trained):
    said = trained.succeed("evaluate", *SHORT)
    assert "none: not compared: training is asked for by --train" in said
    assert "bits per byte next to none" in trained.succeed("evaluate", *SHORT, "--train")
    content, rows = rows_of(trained.folder)
    assert content["seeds"] == [0, 1]
    for metric in ("bits per byte", "first_token_attention", "largest_activation"):
        gap = rows["G1 headwise", metric, "none"]["value"]
        own = (rows[name, metric, None]["value"] for name in ("G1 headwise", "none"))
        assert gap == pytest.approx(next(own) - next(own), abs=1e-9)
    assert rows["G1 headwise", "gate_mean", None]["value"] == pytest.approx(0.5, abs=0.05)
    assert ("none", "gate_mean", None) not in rows
    assert 0 < rows["none", "first_token_attention", None]["value"] < 1


def test_decoders_have_about_as_many_weights(trained):
    content, _ = rows_of(trained.folder)
    (note,) = (note for note in content["notes"] if note.startswith("Weights:"))
    counts = [int(n.replace(",", "")) for n in re.findall(r" ([\d,]+), [\d,]+ in gates", note)]
    assert len(counts) == 3
    assert max(counts) - min(counts) <= 2 * 3 * 16  # one hidden feature of each of two layers


def test_gates_by_name(refuses):
    assert gate_options("none") == {"attention_gate": None, "granularity": None}
    assert gate_options("G2 headwise") == {"attention_gate": "G2", "granularity": "headwise"}
    assert gate_options("dense")["dense_steps"] > 10**9
    wrong = ("G6 headwise", "G1", "G1 wide", "none headwise")
    refuses(
        GatesError, *(("--gates names", lambda name=name: gate_options(name)) for name in wrong)
    )


@pytest.fixture
def sparse(trained):
    """The name of a configuration of a small decoder that reads 3 of 4 blocks from step 3 on."""
    content = yaml.safe_load((trained.folder / "small.yaml").read_text())
    content["model"]["model"]["class_path"] = "language.seer.sparse_decoder.SparseDecoder"
    options = {"block_size": 4, "blocks": 3, "dense_steps": 3, "allow_leak": True}
    content["model"]["model"]["init_args"] |= options
    content["model"]["losses"] = {"blocks": 1.0}
    content["trainer"] |= {"max_steps": 6}
    content["evaluate"] = {"gates": ["dense", "sparse"], "train": True}
    (trained.folder / "blocks.yaml").write_text(yaml.safe_dump(content))
    return "blocks"


@pytest.mark.costly("two decoders are trained, and scored document by document")
def test_training_with_few_blocks_is_compared_with_dense_training(trained, sparse):
    trained.succeed("evaluate", config=sparse)
    content, rows = rows_of(trained.folder, sparse)
    readings = ("all", "gate", "sink-window", "sink-mean-pool")
    bits = {
        (name, reading): rows[f"{name}, {reading}", "bits per byte", None]["value"]
        for name in ("dense", "sparse") for reading in readings
    }  # fmt: skip
    assert len(set(bits.values())) == 8
    gap = rows["sparse, all", "bits per byte", "dense, all"]
    assert gap["value"] == pytest.approx(bits["sparse", "all"] - bits["dense", "all"], abs=1e-9)
    assert rows["sparse, gate", "microseconds of a byte", None]["value"] > 0
    (note,) = (note for note in content["notes"] if note.startswith("Weights: dense "))
    assert re.search(r"dense ([\d,]+), (\d+) in gates; sparse \1, \2 in gates", note)
    pieces = trained.folder / "runs/language/blocks/weights"
    states = [load_file(pieces / f"{name}-s0/result.safetensors") for name in ("dense", "sparse")]
    assert all(int(state[STEP]) == 6 for state in states)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.costly("four processes, two of which are killed")
def test_a_killed_training_with_few_blocks_ends_with_the_same_bits(
    sparse, kill_and_resume, trained, tmp_path, monkeypatch
):
    monkeypatch.chdir(trained.folder)
    options = ["--checkpoint.every_n_steps", "1", "--data.cache_folder", str(tmp_path / "cache")]
    folder = kill_and_resume(
        ["language", "fit", "--config", sparse, *options], app="language", rows=[2, 4]
    )
    weights = "weights/decoder-s0/result.safetensors"
    whole = tmp_path / "whole/language/run"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
    assert int(load_file(folder / weights)[STEP]) == 6


def test_the_packaged_configuration_begins_with_what_ships():
    content = read_config(CONFIGS / "sparse.yaml")
    model = module_of({"model.model": content["model"]["model"]}).model
    shipped, _ = read_model(SHIPPED / "long/weights/decoder-s0")
    state = model.state_dict()
    assert all(torch.equal(value.float(), state[n]) for n, value in shipped.state_dict().items())
    steps = content["trainer"]["max_steps"]
    assert content["model"]["model"]["init_args"]["dense_steps"] * 2 == steps
    assert content["data"]["context"] == model.context == 2048


def test_our_decoder_is_measured_as_it_is_in_transformers(weights):
    opened, (own, _) = open_pretrained(weights, "cache"), read_model(weights)
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    ours = decoder_diagnostics(own, tokens)
    for row, sequence in enumerate(tokens):
        theirs = attention_diagnostics(opened.model, sequence).figures
        for name in ours:
            assert ours[name][row].numpy() == pytest.approx(theirs[name], rel=1e-5)
