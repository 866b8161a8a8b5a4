"""Files of output gates: what they restore, which base they know, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from core_gates.errors import GatesError
from language.gated.attach import (
    CHILD,
    OutputGate,
    attach_output_gate,
    detach_output_gate,
    output_gates,
)
from language.gated.state import load_gates, save_gates
from language.hf.gate_file import fingerprint, weights_digest, write_gates
from language.hf.locate import attached


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A model with random gates, and their file."""
    model = tiny("Llama")
    for gate in attach_output_gate(model, granularity="headwise").values():
        nn.init.normal_(gate.weight, std=0.5)
    return model, save_gates(model, tmp_path_factory.mktemp("gates") / "gates.safetensors")


def test_gates_return_to_their_base(trained, tiny, tokens):
    model, path = trained
    assert path.stat().st_size < 3000
    assert sorted(load_file(path)) == [
        f"layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("bias", "weight")
    ]
    other, started = tiny("Llama"), tiny("Llama")
    attach_output_gate(started, granularity="headwise", bias_init=1.0)
    bare, gates = logits(other, tokens), load_gates(other, path)
    load_gates(started, path)
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    assert torch.equal(logits(started, tokens), logits(model, tokens))
    assert not torch.equal(logits(other, tokens), bare)
    assert all(
        parameter.requires_grad for gate in gates.values() for parameter in gate.parameters()
    )
    for gate in gates.values():
        nn.init.zeros_(gate.weight)
    assert load_gates(other, path) == gates
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    body = tiny("Llama").model
    load_gates(body, path, dtype=torch.float64)
    assert body.layers[1].self_attn.output_gate.weight.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_fingerprint_is_that_of_the_base(trained, tiny):
    model, _ = trained
    base = fingerprint(model)
    assert len(base) == 16
    same = tiny("Llama")
    assert fingerprint(same.model) == fingerprint(same) == base
    assert fingerprint(tiny("Llama").to(torch.bfloat16)) == base
    same.resize_token_embeddings(80)
    assert fingerprint(same) == base
    adapted = get_peft_model(tiny("Llama"), LoraConfig(target_modules=["q_proj", "o_proj"]))
    assert fingerprint(adapted) == base
    changed = tiny("Llama")
    changed.model.layers[1].self_attn.o_proj.weight.data[0, 0] += 1
    others = [changed, tiny("Llama", seed=1), tiny("Llama", num_hidden_layers=3), tiny("Mistral")]
    found = {fingerprint(other) for other in others}
    assert len(found - {base}) == len(others)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj", "input_layernorm"])
def test_a_base_that_differs_in_any_weight_is_refused(refuses, name, trained, tiny):
    """The fingerprint alone sees none of these."""
    model, path = trained
    other = tiny("Llama")
    other.model.layers[1].get_submodule(name).weight.data.mul_(1.1)
    assert fingerprint(other) == fingerprint(model)
    refuses(GatesError, (r"with other weights .*, such as before", lambda: load_gates(other, path)))
    assert not attached(other, CHILD, OutputGate)
    resized = tiny("Llama").to(torch.bfloat16)
    resized.resize_token_embeddings(80)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"])
    for same in (resized, get_peft_model(tiny("Llama"), config)):
        load_gates(same, path)
        assert weights_digest(same) == weights_digest(tiny("Llama"))


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_another_head_or_token_embedding_is_warned_of(name, trained, tiny):
    _, path = trained
    other = tiny("Llama")
    other.get_submodule(name).weight.data[20] += 1  # one token
    said = f"base model with another {'head' if name == 'lm_head' else 'embedding'}, such as"
    with pytest.warns(UserWarning, match=said):
        load_gates(other, path)
    assert attached(other, CHILD, OutputGate)


def test_a_file_whose_options_were_changed_is_refused(trained, tiny, tmp_path):
    _, path = trained
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    other = tmp_path / "other.safetensors"
    for name, value in (("options", facts["options"].replace("sigmoid", "tanh")), ("base", "0")):
        save_file(load_file(path), other, metadata=facts | {name: value})
        with pytest.raises(GatesError, match="its values or options are not those written"):
            load_gates(tiny("Llama"), other)


def test_gates_that_do_not_fit_are_refused(trained, tiny, tokens, tmp_path, refuses):
    model, path = trained
    content = path.read_bytes()
    bad = {
        name: tmp_path / f"{name}.safetensors" for name in ("cut", "flip", "plain", "kind", "part")
    }
    bad["cut"].write_bytes(content[: len(content) // 2])
    bad["flip"].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    tensors = load_file(path)
    save_file(tensors, bad["plain"])
    options = next(iter(output_gates(model).values())).options
    write_gates(bad["kind"], model, kind="block", options=options, tensors=tensors)
    del tensors["layers.0.self_attn.bias"]
    write_gates(bad["part"], model, kind="output", options=options, tensors=tensors)
    other, elementwise = tiny("Llama", seed=1), tiny("Llama")
    attach_output_gate(elementwise)
    bare, base = tiny("Llama"), json.dumps(fingerprint(model))[1:-1]
    refuses(
        GatesError,
        ("cut.safetensors is damaged or not", lambda: load_gates(bare, bad["cut"])),
        ("flip.safetensors is damaged, its", lambda: load_gates(bare, bad["flip"])),
        ("plain.safetensors is not a file of gates", lambda: load_gates(bare, bad["plain"])),
        ("gates of kind 'block', expected 'output'", lambda: load_gates(bare, bad["kind"])),
        ("part.safetensors holds gates with .* do not fit", lambda: load_gates(bare, bad["part"])),
        (
            "none.safetensors does not exist",
            lambda: load_gates(bare, tmp_path / "none.safetensors"),
        ),
        (f"the base model {base}, this one is", lambda: load_gates(other, path)),
        ("headwise.* do not fit .*elementwise", lambda: load_gates(elementwise, path)),
        ("has no output gates", lambda: save_gates(bare, tmp_path / "new.safetensors")),
    )
    assert torch.equal(logits(bare, tokens), logits(tiny("Llama"), tokens))
    assert not attached(bare, CHILD, OutputGate)
    assert not attached(other, CHILD, OutputGate)
    assert len(detach_output_gate(elementwise)) == 2
