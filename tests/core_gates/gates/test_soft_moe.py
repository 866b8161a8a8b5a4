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
    inputs = routing.dispatch.flatten(1).T @ g["softmoe_x"]
    assert_close(inputs, g["softmoe_slot_inputs"], rtol=0, atol=1e-10)


def test_dispatch_sums_to_one_over_positions_and_weights_over_slots():
    routing = make()(positions(2, 7, 5))
    assert_close(routing.dispatch.sum(1), torch.ones(2, 3, 2, dtype=torch.float64))
    assert_close(routing.weights.sum((-2, -1)), torch.ones(2, 7, dtype=torch.float64))
    assert_close(routing.probs, routing.weights.sum(-1))
    assert_close(routing.logits.softmax(-1), routing.probs)
    assert routing.num_experts == 3


def test_length_of_the_input_hardly_matters():
    gate, x = make(), positions(7, 5)
    assert_close(gate(100 * x).dispatch, gate(x).dispatch, rtol=1e-5, atol=1e-6)


def test_padding_is_as_if_it_were_not_there():
    gate, x = make(), positions(2, 6, 5)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:], mask[1] = True, True
    x_padded = x.masked_fill(mask.unsqueeze(-1), torch.nan).requires_grad_()
    routing = gate(x_padded, padding_mask=mask)
    alone = gate(x[0, :4])
    assert_close(routing.dispatch[0, :4], alone.dispatch)
    assert_close(routing.weights[0, :4], alone.weights)
    for weights in (routing.dispatch, routing.weights):
        assert not weights[mask].any()
    (routing.dispatch.square().sum() + routing.weights.square().sum()).backward()
    assert x_padded.grad.isfinite().all()
    assert not x_padded.grad[mask].any()


def test_sequences_of_a_batch_do_not_mix():
    gate, x = make(), positions(3, 6, 5)
    together = gate(x)
    for i in range(3):
        assert_close(together.dispatch[i], gate(x[i]).dispatch)


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


def test_arguments_are_checked(refuses):
    refuses(
        ValueError,
        ("initial_scale", lambda: SoftMoEGate(3, 4, initial_scale=0.0)),
        ("num_slots must be at least 1, got 0", lambda: SoftMoEGate(3, 4, num_slots=0)),
        (r"x \(5,\) must be \(..., T, D\): slots mix tokens", lambda: make()(positions(5))),
        (
            "padding_mask",
            lambda: make()(positions(4, 5), padding_mask=torch.zeros(3, dtype=torch.bool)),
        ),
    )
