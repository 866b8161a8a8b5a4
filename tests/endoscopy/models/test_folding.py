"""Folded networks: the same output by the operations of a network without gates."""

from collections import Counter

import pytest
import torch

from endoscopy.models import (
    MultiStreamSizer,
    fold,
    fsg_resnet18,
    fsg_vit,
    gate_parameters,
    gates_of,
    tiny_resnet,
    tiny_vit,
)

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def swiglu(**options):
    return fsg_vit("eva02_tiny_patch14_224", trunk_options={**SMALL, "patch_size": 8}, **options)


def convnext(**options):
    sizes = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}
    return fsg_vit("convnext_tiny", trunk_options=sizes, **options)


NETWORKS = {
    "vit": (lambda **k: fsg_vit(trunk_options={**SMALL, "init_values": 0.5}, **k), 16),
    "swiglu": (swiglu, 16),
    "convnext": (convnext, 32),
    "three streams": (
        lambda **k: fsg_resnet18(("rgb", "loc", "depth"), geometry=True, hidden_dim=16, **k),
        32,
    ),
    "efficientnet": (lambda **k: MultiStreamSizer("efficientnet_b0", hidden_dim=16, **k), 32),
    "tiny resnet": (lambda **k: tiny_resnet(("rgb", "depth"), **k), 32),
    "tiny vit": (lambda **k: tiny_vit(("rgb",), geometry=True, **k), 64),
}


@pytest.fixture(params=NETWORKS)
def case(request, grown):
    """How to build a network, a grown one, and what it reads."""
    build, size = NETWORKS[request.param]
    torch.manual_seed(0)
    streams = {"rgb": torch.randn(2, 3, size, size), "depth": torch.randn(2, 1, size, size)}
    streams["loc"] = torch.randn(2, 3, size, size)
    inputs = streams, torch.randn(2, 4)
    return build, grown(build(), *inputs), inputs


def operations(model, inputs):
    """How often each operation stands in the exported graph."""
    streams = {name: inputs[0][name] for name in model.branches}
    program = torch.export.export(model, (streams, inputs[1]))
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


@torch.no_grad()
def test_folded_equals_gated_without_any_further_operation(case):
    build, model, inputs = case
    gated = model(*inputs)
    folded = fold(model)
    assert (folded(*inputs) - gated).abs().max() < 1e-5 * gated.abs().max()
    assert gated.std() > 1e-3 * gated.abs().max()  # else nothing but the bias would be compared
    assert not gates_of(folded)
    plain = build(gates="none").eval()
    assert [type(module) for module in folded.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(folded.state_dict())  # it is a network without gates
    if build is NETWORKS["efficientnet"][0]:  # seconds to export, and its trunk has no gates
        return
    expected = operations(plain, inputs)
    assert operations(folded, inputs) == expected
    if build is NETWORKS["vit"][0]:
        assert operations(model, inputs).total() > expected.total()


@torch.no_grad()
def test_the_network_that_is_folded_stays_as_it_was(case):
    _, model, inputs = case
    before = model(*inputs)
    for gate in gates_of(model).values():
        gate.logits.fill_(-30.0)  # all closed
    closed = model(*inputs)
    assert not torch.allclose(before, closed, rtol=1e-3)
    folded = fold(model)
    assert torch.equal(model(*inputs), closed)
    assert torch.allclose(folded(*inputs), closed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gates", ["l0", "layer_scale", "se", "none"])
@torch.no_grad()
def test_every_kind_of_gate(gates, grown):
    streams = {"rgb": torch.randn(4, 3, 32, 32), "depth": torch.randn(4, 1, 32, 32)}
    model = grown(tiny_resnet(("rgb", "depth"), gates=gates, hidden_dim=8), streams)
    expected = model(streams)
    folded = fold(model)
    assert (folded(streams) - expected).abs().max() < 1e-5 * expected.abs().max()
    static = gates in ("l0", "layer_scale")
    kinds = [type(module) for module in model.modules()]
    assert (kinds != [type(module) for module in folded.modules()]) == static


def test_a_folded_network_is_saved_as_one_without_gates(tmp_path, grown):
    model = grown(tiny_resnet())
    fold(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.arguments == {**model.arguments, "gates": "none"}
    images = {"rgb_mask": torch.randn(2, 4, 32, 32)}
    assert torch.equal(loaded(images), fold(model)(images))
    assert not gate_parameters(loaded)
