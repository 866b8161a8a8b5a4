"""Folding in networks written here, so that no library is needed to test it."""

import copy

import pytest
import torch
from torch.testing import assert_close

from core_gates.surgery import fold_gates, inject_gates


@pytest.fixture(params=["vit", "resnet"])
def network(request, models):
    torch.manual_seed(0)
    if request.param == "vit":
        return models["vit"](16, 8, 24, 2, 3, 5), torch.randn(2, 3, 16, 16)
    return models["resnet"](3, (4, 6, 8, 10), 5), torch.randn(2, 3, 32, 32)


def test_folded_equals_gated(network):
    model, images = network
    model = model.double().eval()
    images = images.double()
    gates = inject_gates(model)
    assert len(gates) == 4
    with torch.no_grad():
        gated = model(images)
        folded = fold_gates(copy.deepcopy(model))
        assert_close(folded(images), gated, rtol=1e-12, atol=1e-12)
        for gate in gates.values():
            gate.logits.fill_(20.0)  # scores of one: the plain model
        plain = model(images)
    assert not torch.allclose(plain, gated, rtol=1e-3)


def test_two_streams_fold_all_but_their_last_stage(models):
    torch.manual_seed(0)
    model = models["multi_stream"]({"rgb": 3, "depth": 1}, 8).double().eval()
    streams = {name: torch.randn(2, n, 32, 32).double() for name, n in (("rgb", 3), ("depth", 1))}
    gated = model(streams)
    with pytest.raises(ValueError, match=r"gate of branches\.rgb\.layer4 cannot be folded"):
        fold_gates(model)
    assert_close(model(streams), gated, rtol=0, atol=0)
    fold_gates(model, where=["*.layer[123]"])
    last = [model.branches[name].layer4.gate.scores() for name in streams]
    model.gate1.fold_into(model.fc2, "input")
    model.gate2.fold_into(model.fc3, "input")
    model.fc2.weight.data *= torch.cat(last)
    for name in streams:
        del model.branches[name].layer4.gate
    model.gate1 = model.gate2 = torch.nn.Identity()
    assert_close(model(streams), gated, rtol=1e-10, atol=1e-12)
