"""Files of block gates: what they restore, and what is refused."""

import json
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import language
from core_gates.attention.seer.decode import BlockSelector
from core_gates.errors import GatesError
from harness.files.rounding import from_8_bits, in_8_bits
from language.gated.attach import attach_output_gate, detach_output_gate
from language.gated.state import load_gates, save_gates
from language.hf.gate_file import read_gates, read_tensors, write_gates
from language.seer.attach import attach_block_gates, block_gates, choose_blocks, detach_block_gates
from language.seer.block_files import load_block_gates, save_block_gates

SMOLLM2 = {
    **{"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "intermediate_size": 8},
}
"""Attention of SmolLM2-135M, with small multilayer perceptrons."""
SHIPPED = sorted(Path(language.__file__).parent.glob("weights/seer_smollm2/gates/*/*.safetensors"))


def sparse(model, tokens):
    choose_blocks(model, BlockSelector(k=2, dense_rows=0))
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def saved(tiny, tmp_path):
    model = tiny()
    for gate in attach_block_gates(model, block_size=4).values():
        torch.nn.init.normal_(gate.gate.weight_k)
    return model, save_block_gates(model, tmp_path / "gates.safetensors")


def test_gates_return_to_their_base_alone_and_in_8_bits(saved, tiny, tokens, tmp_path):
    model, path = saved
    other = tiny()
    names = list(other.state_dict())
    gates = load_block_gates(other, path)
    assert torch.equal(sparse(other, tokens), sparse(model, tokens))
    assert set(model.state_dict()) - set(names) == {
        f"model.{name}.block_gate.gate.weight_k" for name in gates
    }
    small = save_block_gates(model, tmp_path / "small.safetensors", rounded=in_8_bits)
    assert small.stat().st_size < path.stat().st_size / 2
    load_block_gates(other, small)
    for own, found in zip(block_gates(model).values(), gates.values(), strict=True):
        weight, rounded = own.gate.weight_k, found.gate.weight_k
        bound = weight.abs().amax(-1, keepdim=True) / 127
        assert (weight - rounded).abs().max() > 0
        assert ((weight - rounded).abs() <= bound).all()


@pytest.mark.fault("46 A3")
def test_beyond_the_context_that_gates_learned_from_there_is_one_warning(
    saved, tiny, tokens, tmp_path
):
    model, path = saved
    longer = torch.cat([tokens, tokens], 1)
    for gate in block_gates(model).values():
        gate.context = 26
    known = save_block_gates(model, tmp_path / "known.safetensors")
    assert read_gates(known, model, kind="block")[0]["context"] == 26
    other = tiny()
    gates = load_block_gates(other, known)
    assert [gate.context for gate in gates.values()] == [26, 26]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sparse(other, tokens)
        choose_blocks(other, None)
        other(longer)
        assert not said
        for _ in range(2):
            sparse(other, longer)
    (one,) = (str(warning.message) for warning in said)
    assert re.search(r"distilled from sequences of 26 tokens, this one is longer", one)
    assert "\n" not in one
    load_block_gates(other, path)  # a file that does not know it
    assert [gate.context for gate in gates.values()] == [None, None]


@pytest.mark.fault("46 A3")
@pytest.mark.parametrize("name", ["seer", "seer_smollm2"])
def test_gates_that_ship_know_the_context_of_their_record(name):
    homes = Path(language.__file__).parent.glob(f"weights/{name}/gates/*")
    for home in homes:
        settings = json.loads((home / "record.json").read_text())["settings"]
        facts, _ = read_tensors(home / "gates.safetensors")
        assert json.loads(facts["options"])["context"] == settings["context"]


def test_other_gates_are_refused_before_the_model_changes(refuses, saved, tiny, tokens, tmp_path):
    model, path = saved
    before = sparse(model, tokens)
    detach_block_gates(model)
    attach_block_gates(model, "decode", block_size=4)
    refuses(GatesError, ("do not fit", lambda: load_block_gates(model, path)))
    detach_block_gates(model)
    attach_block_gates(model, block_size=8)
    refuses(GatesError, ("do not fit", lambda: load_block_gates(model, path)))
    detach_block_gates(model)
    load_block_gates(model, path)
    assert torch.equal(sparse(model, tokens), before)
    another = tiny(initializer_range=0.2)
    refuses(
        GatesError,
        ("of the base model", lambda: load_block_gates(another, path)),
        ("no block gates", lambda: block_gates(another)),
    )
    bare = tiny()
    implementation = bare.config._attn_implementation
    options, stored = read_gates(path, bare, kind="block")
    wrong = {name: tensor[..., 1:] for name, tensor in stored.items()}
    odd = write_gates(
        tmp_path / "odd.safetensors", bare, kind="block", options=options, tensors=wrong
    )
    refuses(GatesError, ("do not fit", lambda: load_block_gates(bare, odd)))
    assert bare.config._attn_implementation == implementation
    assert list(bare.state_dict()) == list(another.state_dict())
    attach_output_gate(another)
    output = save_gates(another, tmp_path / "output.safetensors")
    detach_output_gate(another)
    refuses(
        GatesError,
        ("kind 'output', expected 'block'", lambda: load_block_gates(another, output)),
        ("kind 'block', expected 'output'", lambda: load_gates(tiny(), path)),
    )
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    refuses(GatesError, ("damaged", lambda: load_block_gates(tiny(), path)))


@pytest.mark.skipif(not SHIPPED, reason="gates of SmolLM2 are not in this installation")
def test_gates_of_smollm2_that_ship_fit_its_attention_and_refuse_other_weights(
    refuses, tiny, monkeypatch
):
    model = tiny(**SMOLLM2)
    for path in SHIPPED:
        refuses(GatesError, ("of the base model", partial(load_block_gates, model, path)))
        facts, stored = read_tensors(path)
        with monkeypatch.context() as patched:
            for fact, name in {"base": "fingerprint", "weights": "weights_digest"}.items():
                patched.setattr(f"language.hf.gate_file.{name}", lambda _, v=facts[fact]: v)
            gates = load_block_gates(model, path)
        weights = from_8_bits(stored)
        assert len(gates) == SMOLLM2["num_hidden_layers"]
        for name, gate in gates.items():
            for key, value in gate.gate.state_dict().items():
                assert torch.equal(value, weights.pop(f"{name}.{key}"))
        assert not weights
        choose_blocks(model, BlockSelector(k=1, dense_rows=0))
        with torch.no_grad():
            assert model(torch.arange(1, 49).unsqueeze(0)).logits.isfinite().all()
        detach_block_gates(model)
    assert sum(path.stat().st_size for path in SHIPPED) <= 6e6
