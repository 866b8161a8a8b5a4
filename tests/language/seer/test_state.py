"""Files of block gates: what they restore, and what is refused."""

import pytest
import torch

from core_gates.attention.seer.decode import BlockSelector
from core_gates.errors import GatesError
from harness.files.rounding import in_8_bits
from language.gated.attach import attach_output_gate, detach_output_gate
from language.gated.state import load_gates, save_gates
from language.seer.attach import attach_block_gates, block_gates, choose_blocks, detach_block_gates
from language.seer.block_files import load_block_gates, save_block_gates


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


def test_other_gates_are_refused_before_the_model_changes(saved, tiny, tokens, tmp_path):
    model, path = saved
    before = sparse(model, tokens)
    detach_block_gates(model)
    attach_block_gates(model, "decode", block_size=4)
    with pytest.raises(GatesError, match="do not fit"):
        load_block_gates(model, path)
    detach_block_gates(model)
    attach_block_gates(model, block_size=8)
    with pytest.raises(GatesError, match="do not fit"):
        load_block_gates(model, path)
    detach_block_gates(model)
    load_block_gates(model, path)
    assert torch.equal(sparse(model, tokens), before)
    another = tiny(initializer_range=0.2)
    with pytest.raises(GatesError, match="of the base model"):
        load_block_gates(another, path)
    with pytest.raises(GatesError, match="no block gates"):
        block_gates(another)
    attach_output_gate(another)
    output = save_gates(another, tmp_path / "output.safetensors")
    detach_output_gate(another)
    with pytest.raises(GatesError, match="kind 'output', expected 'block'"):
        load_block_gates(another, output)
    with pytest.raises(GatesError, match="kind 'block', expected 'output'"):
        load_gates(tiny(), path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(GatesError, match="damaged"):
        load_block_gates(tiny(), path)
