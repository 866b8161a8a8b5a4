import pytest
import torch
from torch.testing import assert_close

from core_gates import MoELayer, SoftMoEGate, StackedExperts


def make(dim=5, num_experts=3, num_slots=2, dtype=torch.float64):
    torch.manual_seed(0)
    gate = SoftMoEGate(dim, num_experts, num_slots=num_slots, dtype=dtype)
    gate.scale.data.fill_(1.3)
    return gate


def positions(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", ["standard_T24_E6_k2", "standard_T32_E8_k3"])
def test_golden_weights_and_slots(golden, name):
    g = golden(name)
    num_slots = int(g["softmoe_slots"])
    dim, total = g["softmoe_phi"].shape
    gate = make(dim, total // num_slots, num_slots)
    gate.weight.data.copy_(g["softmoe_phi"].T)
    gate.scale.data.copy_(g["softmoe_scale"])
    routing = gate(g["softmoe_x"])
    assert routing.dispatch.shape == (len(g["softmoe_x"]), total // num_slots, num_slots)
    assert_close(routing.dispatch.flatten(1), g["softmoe_dispatch"], rtol=0, atol=1e-10)
    assert_close(routing.weights.flatten(1), g["softmoe_combine"], rtol=0, atol=1e-10)
    assert_close(routing.probs, routing.weights.sum(-1))
    inputs = routing.dispatch.flatten(1).T @ g["softmoe_x"]
    assert_close(inputs, g["softmoe_slot_inputs"], rtol=0, atol=1e-10)


def test_length_of_the_input_hardly_matters():
    gate, x = make(), positions(7, 5)
    assert_close(gate(100 * x).dispatch, gate(x).dispatch, rtol=1e-5, atol=1e-6)


def test_padding_is_as_if_it_were_not_there():
    gate, x, mask = make(), positions(2, 6, 5), torch.arange(12).view(2, 6) > 3
    routing = gate(x.masked_fill(mask.unsqueeze(-1), torch.nan), padding_mask=mask)
    alone = gate(x[0, :4])
    assert_close((routing.dispatch[0, :4], routing.weights[0, :4]), (alone.dispatch, alone.weights))
    assert not torch.cat([routing.dispatch, routing.weights])[mask.repeat(2, 1)].any()


def test_equal_experts_receive_and_return_the_mean():
    gate = make()
    gate.scale.data.zero_()
    x = positions(4, 5).float()
    experts = StackedExperts(3, 5, 4)
    for parameter in experts.parameters():
        parameter.data.copy_(parameter[:1].expand_as(parameter).clone())
    y, _ = MoELayer(gate, experts)(x)
    assert_close(y, experts.single(x.mean(0), 0).expand(4, 5))


def test_the_scale_bounds_the_logits():
    torch.manual_seed(0)
    x = positions(64, 100).abs().float()  # much alike, as pixels are
    largest = [SoftMoEGate(100, 3, initial_scale=s)(x).dispatch.max() * 64 for s in (1.0, 10.0)]
    assert largest[0] < 1.5  # a slot is close to the mean of all tokens
    assert largest[1] > 3
    with torch.device("meta"):
        gate = SoftMoEGate(100, 3, initial_scale=10.0)
    gate.to_empty(device="cpu").reset_parameters()
    assert gate.scale.item() == 10
