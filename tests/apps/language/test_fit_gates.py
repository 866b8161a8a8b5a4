"""``gates language fit-gates``: what is trained and kept, kills, and refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, MambaConfig

from apps.language.fit_gates import Training
from language.gated.state import load_gates
from language.hf.pretrained import open_pretrained
from language.module import LanguageModule

SHORT = ("--corpus", "corpus", "--context", "16", "--batch_size", "4", "--steps", "6",
         "--warmup_steps", "2")  # fmt: skip


def result(folder, name):
    return folder / "runs/language" / name / "gates/output_gate-s0"


def loss(model, tokens):
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


@pytest.mark.parametrize("train", ["gates", "projections", "all"])
def test_what_is_trained_is_kept(train, trained, weights):
    words = ("--model", weights, "--name", train, "--train", train, *SHORT)
    said = trained.succeed("fit-gates", *words, config=None)
    folder = result(trained.folder, train)
    assert f"{folder.relative_to(trained.folder)}/gates.safetensors" in said
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["gates.safetensors", "record.json", *(["model"] if train != "gates" else [])]
    )
    before = AutoModelForCausalLM.from_pretrained(weights)
    base = open_pretrained(weights if train == "gates" else folder / "model", "cache").model
    changed = [n for n, p in base.named_parameters() if not p.equal(before.get_parameter(n))]
    everything = [name for name, _ in before.named_parameters()]
    projections = [name for name in everything if name.endswith("o_proj.weight")]
    assert changed == {"gates": [], "projections": projections, "all": everything}[train]
    gates = load_gates(base, folder / "gates.safetensors")
    assert all(gate.bias.std() > 0 for gate in gates.values())
    facts = json.loads((folder / "record.json").read_text())["facts"]
    assert sum(facts["gates"]["bits"]) < sum(facts["before"]["bits"])


@pytest.mark.fault("46 A5")
@pytest.mark.parametrize("train", ["gates", "projections", "all"])
def test_a_lora_of_equal_size_is_the_control(train, trained, weights):
    said = trained.succeed(
        "fit-gates", "--model", weights, "--name", train, "--train", train, *SHORT, config=None
    )
    facts = json.loads((result(trained.folder, train) / "record.json").read_text())["facts"]
    gates, lora, before = (np.array(facts[n]["bits"]) for n in ("gates", "lora", "before"))
    assert lora.mean() < before.mean()
    assert not np.array_equal(lora, gates)
    added = sum(p.numel() for p in gates_of(trained.folder, train, weights))
    assert abs(facts["lora"]["size"] - facts["gates"]["size"]) <= 0.06 * added
    for one, bits in ((facts["gates"], gates), (facts["lora"], lora)):
        trials = {float(rate): value for rate, value in one["trials"].items()}
        assert (trials.keys(), one["rate"]) == ({0.01, 0.001}, min(trials, key=trials.get))
        assert train != "gates" or one["rate"] == Training().learning_rate  # the default is better
        assert bits.mean() not in trials.values()  # those are of validation
    first, second = (line for line in said.splitlines() if line.startswith("bits per held-out"))
    for line, other in ((first, before), (second, lora)):
        gap = (gates - other).mean()
        assert f"{gates.mean():.4f} with gates ({facts['gates']['size']:,} param" in line
        assert f"{other.mean():.4f} " in line
        assert f": {gap:+.4f} [" in line
        assert line.endswith(f" over {len(set(facts['files']))} documents")
    assert f"with a LoRA ({facts['lora']['size']:,} parameters trained, rate " in second


def gates_of(folder, train, weights):
    """Return the parameters of the gates that a run has trained."""
    made = result(folder, train)
    base = weights if train == "gates" else made / "model"
    found = load_gates(open_pretrained(base, "cache").model, made / "gates.safetensors")
    return [p for gate in found.values() for p in gate.parameters()]


def test_what_is_cut_off_ends_with_the_same_bits(refuses, trained, weights, cut_off):
    def gates(name):
        trained.succeed("fit-gates", "--model", weights, "--name", name, *SHORT, config=None)
        return load_file(result(trained.folder, name) / "gates.safetensors")

    calls = cut_off(LanguageModule, "training_step", 4)
    refuses(RuntimeError, ("cut off", lambda: gates("cut")))
    found, number = gates("cut"), len(calls)
    assert_close(gates("whole"), found, rtol=0, atol=0)
    assert len(calls) - number == number - 1


def test_gates_of_other_sequences_are_not_replaced(trained, weights):
    call = ("language", "fit-gates", "--model", weights, "--name", "kept")
    assert trained(*call, *SHORT).code == 0
    before = (result(trained.folder, "kept") / "record.json").read_text()
    (trained.folder / "other-texts").mkdir()
    for number in range(60):
        (trained.folder / f"other-texts/{number}.txt").write_text(f"{number} words and words " * 9)
    found = trained(*call, *SHORT[2:], "--corpus", "other-texts")
    assert found.code == 2
    assert "output_gate-s0 was made with other settings (digest" in found.err
    assert found.err.count("\n") == 1
    model = AutoModelForCausalLM.from_pretrained(weights)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    model.save_pretrained(shutil.copytree(weights, trained.folder / "tuned-base"))
    found = trained(*call[:3], "tuned-base", *call[4:], *SHORT)
    assert found.code == 2
    assert "output_gate-s0 was made with other settings (weights" in found.err
    assert (result(trained.folder, "kept") / "record.json").read_text() == before
    with (result(trained.folder, "kept") / "gates.safetensors").open("ab") as file:
        file.write(b"\0")
    found = trained(*call, *SHORT)
    assert (found.code, found.out) == (2, "")
    assert "gates.safetensors" in found.err


def test_misuse_is_one_line(trained, weights, faulty_inputs):
    call = ("language", "fit-gates", "--model", str(weights))
    mamba = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=2)

    def write(path):
        AutoModelForCausalLM.from_config(mamba).save_pretrained(path)
        open_pretrained(weights, "cache").tokenizer.save(path)

    faulty_inputs(
        {
            "no attention": (
                ("language", "fit-gates", "--model", "mamba", "--name", "new", *SHORT),
                "MambaModel has no attention that is known: looked for modules with one of q_proj",
                {"mamba": write},
            ),
            "beyond the context": (
                (*call, "--name", "new", *SHORT, "--context", "17"),
                "decoder-s0 reads at most 16 tokens, 17 are asked for",
            ),
            "no steps": ((*call, "--name", "new", "--steps", "0"), "steps must be at least 1"),
            "a rate of 0": ((*call, "--learning_rate", "0"), "learning_rate must be positive"),
            "no such part": ((*call, "--train", "heads"), "train: expected"),
        },
        folder=trained.folder,
    )  # fmt: skip
