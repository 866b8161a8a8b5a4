import math
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates import (
    DSelectKGate,
    HardConcreteGate,
    RoutingOutput,
    SoftmaxGate,
    TopKGate,
    balance_loss,
    entropy_loss,
    importance_loss,
    l0_loss,
    z_loss,
)
from core_gates.routing import information_loss, orthogonality_loss

LOSSES = {
    "balance": balance_loss,
    "balance of sequences": partial(balance_loss, scope="sequence"),
    "z": z_loss,
    "entropy": entropy_loss,
    "information": information_loss,
    "l0": l0_loss,
    "importance": importance_loss,
}
STANDARD = ["standard_T24_E6_k2", "standard_T32_E8_k3"]


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def route(logits, k):
    gate = TopKGate(logits.shape[-1], logits.shape[-1], k=k, renormalize=False, dtype=logits.dtype)
    gate.weight.data.copy_(torch.eye(logits.shape[-1]))
    return gate(logits)


def example(*leading, experts=5, k=2):
    return route(
        torch.randn(
            *leading, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ),
        k,
    )


@pytest.mark.parametrize("name", STANDARD)
def test_golden_values_and_gradients(golden, name):
    g = golden(name)
    for loss, value, gradient in (
        (balance_loss, "lb_loss_topk", "grad_lb_loss"),
        (z_loss, "z_loss", "grad_z_loss"),
    ):
        logits = g["logits"].clone().requires_grad_()
        result = loss(route(logits, int(g["k"])))
        assert_close(result, g[value], rtol=0, atol=1e-10)
        assert_close(torch.autograd.grad(result, logits)[0], g[gradient], rtol=0, atol=1e-10)
    routing = route(g["logits"], int(g["k"]))
    assert_close(entropy_loss(routing), g["entropy_mean"], rtol=0, atol=1e-10)
    assert_close(importance_loss(routing), g["importance_cv2"], rtol=0, atol=1e-10)


def test_balance_gradient_flows_through_all_probs_but_not_the_counts():
    probs = torch.tensor([[0.7, 0.2, 0.1]], requires_grad=True)
    weights = torch.tensor([[0.7, 0.2]], requires_grad=True)
    balance_loss(RoutingOutput(weights, torch.tensor([[0, 1]]), probs=probs)).backward()
    assert_close(probs.grad, torch.tensor([[1.5, 1.5, 0.0]]) - 1.35)  # of probs over their sum
    assert weights.grad is None


@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
@pytest.mark.parametrize("gate", [DSelectKGate, HardConcreteGate])
def test_balance_is_not_escaped_by_losing_mass(gate, scope):
    torch.manual_seed(0)
    gate, x = gate(8, 5), torch.randn(4, 16, 8)
    routing = gate(x)
    loss = balance_loss(routing, scope=scope)
    assert loss.item() == pytest.approx(1, abs=1e-3)
    assert_close(balance_loss(routing._replace(probs=routing.probs / 2), scope=scope), loss)
    routing.probs[0, 3:] *= 1e-30  # all but closed
    assert balance_loss(routing, scope=scope).item() == pytest.approx(1, abs=1e-3)


def test_balance_skips_positions_without_any_mass():
    whole, part = example(2, 8), example(2, 8)
    probs = part.probs.clone()
    probs[0, :3] = 0
    probs.requires_grad_()
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, :3] = True
    for scope in ("batch", "sequence"):
        loss = balance_loss(part._replace(probs=probs), scope=scope)
        assert_close(loss, balance_loss(whole, scope=scope, padding_mask=mask))
        assert torch.autograd.grad(loss, probs)[0].isfinite().all()
    assert balance_loss(part._replace(probs=torch.full_like(probs, torch.nan))).isnan()


def test_balance_counts_dropped_choices():
    routing = example(16)
    dropped = routing._replace(kept=torch.zeros_like(routing.indices, dtype=torch.bool))
    assert balance_loss(dropped) == balance_loss(routing)


def test_balance_of_sequences_is_the_mean_over_sequences():
    routing = example(3, 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 5:] = True
    mask[2] = True  # a sequence of padding alone has no say

    def sequence(i, n):
        return balance_loss(
            RoutingOutput(
                routing.weights[i, :n], routing.indices[i, :n], probs=routing.probs[i, :n]
            )
        )

    expected = (sequence(0, 5) + sequence(1, 8)) / 2
    assert_close(balance_loss(routing, scope="sequence", padding_mask=mask), expected)
    assert not torch.isclose(balance_loss(routing, padding_mask=mask), expected)


def test_closed_forms():
    uniform = SoftmaxGate(3, 8)
    torch.nn.init.zeros_(uniform.weight)
    routing = uniform(torch.randn(5, 3))
    assert entropy_loss(routing).item() == pytest.approx(math.log(8))
    assert z_loss(routing).item() == pytest.approx(math.log(8) ** 2)
    assert importance_loss(routing).item() == pytest.approx(0, abs=1e-12)
    assert balance_loss(routing).item() == pytest.approx(1)
    gates = RoutingOutput(torch.zeros(2, 3), probs=torch.tensor([[0.5, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    assert l0_loss(gates).item() == pytest.approx(2.25)


def test_information_lies_between_its_extremes():
    alike = RoutingOutput(torch.ones(4, 4), probs=torch.softmax(torch.arange(4.0), 0).expand(4, 4))
    assert information_loss(alike).item() == pytest.approx(0, abs=1e-6)
    sure = RoutingOutput(torch.eye(4), probs=torch.eye(4))
    assert information_loss(sure).item() == pytest.approx(-math.log(4))
    routing = example(40)
    joint = routing.probs / 40  # of token and expert
    outer = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert_close(information_loss(routing), -(joint * (joint / outer).log()).sum())


def test_orthogonality_is_the_mean_squared_cosine():
    weight = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [torch.cosine_similarity(w[i], w[j], 0) for w in weight for i, j in pairs]
    assert_close(orthogonality_loss(weight), torch.stack(cosines).square().mean())
    assert_close(orthogonality_loss(7 * weight), orthogonality_loss(weight))
    assert orthogonality_loss(torch.eye(4)) == 0
    assert orthogonality_loss(torch.tensor([[1.0, 2], [-2, -4]])).item() == pytest.approx(1)
    assert orthogonality_loss(torch.ones(1, 5)) == 0
    assert gradcheck(orthogonality_loss, (weight.requires_grad_(),))


def test_entropy_of_a_certain_choice_is_zero_with_a_finite_gradient():
    probs = torch.tensor([[1.0, 0.0]], requires_grad=True)
    value = entropy_loss(RoutingOutput(probs, probs=probs))
    value.backward()
    assert value == 0
    assert probs.grad.isfinite().all()


def test_padding_does_not_count_whatever_it_holds(loss):
    clean, mask = example(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 6:] = True
    logits = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    poisoned = logits.masked_fill(mask.unsqueeze(-1), torch.nan).requires_grad_()
    gate = TopKGate(5, 5, k=2, renormalize=False, dtype=torch.float64)
    gate.weight.data.copy_(torch.eye(5))
    value = loss(gate(poisoned, padding_mask=mask), padding_mask=mask)
    value.backward()
    assert_close(value, loss(RoutingOutput(*(t[:, :6] if t is not None else t for t in clean))))
    assert (poisoned.grad[mask] == 0).all()
    assert gate.weight.grad.isfinite().all()


def test_padding_counts_on_request(loss):
    routing, mask = example(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 3:] = True
    assert loss(routing, padding_mask=mask, padding_in_loss=True) == loss(routing)
    assert l0_loss is loss or loss(routing, padding_mask=mask) != loss(routing)


@pytest.mark.parametrize("num_positions", [0, 4])
def test_without_any_position_the_loss_is_zero(loss, num_positions):
    logits = torch.randn(2, num_positions, 5, requires_grad=True)
    mask = torch.ones(2, num_positions, dtype=torch.bool)
    value = loss(route(logits, 2).ignore(mask), padding_mask=mask)
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()


def test_gradients(loss):
    logits = torch.randn(
        2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).requires_grad_()
    assert gradcheck(lambda logits: loss(route(logits, 2)), (logits,))


@pytest.mark.parametrize(
    ("loss", "field"),
    [
        (balance_loss, "probs"),
        (z_loss, "logits"),
        (entropy_loss, "probs"),
        (information_loss, "probs"),
        (l0_loss, "probs"),
    ],
)
def test_a_missing_field_is_named_with_its_gate(loss, field):
    message = rf"RoutingOutput\.{field}, which gate 'layers\.3\.gate' does not return"
    with pytest.raises(ValueError, match=message):
        loss(RoutingOutput(torch.ones(2, 2)), gate="layers.3.gate")


def test_wrong_scopes_and_masks_are_refused(loss, refuses):
    refuses(
        ValueError,
        ("choose one of batch, sequence, global", lambda: balance_loss(example(2), scope="world")),
        ("shape", lambda: loss(example(3, 8), padding_mask=torch.zeros(8, dtype=torch.bool))),
    )


def global_balance(logits, mask, sizes):
    start = sum(sizes[: dist.get_rank()])
    mine = slice(start, start + sizes[dist.get_rank()])
    logits = logits[mine].clone().requires_grad_()
    value = balance_loss(route(logits, 2), scope="global", padding_mask=mask[mine])
    value.backward()
    return value.detach(), logits.grad


def test_global_scope_is_the_loss_of_the_joined_batch(ranks):
    logits = torch.randn(10, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask = torch.arange(10) % 4 == 0
    (first, first_grad), (second, second_grad) = ranks(global_balance, logits, mask, [7, 3])
    logits.requires_grad_()
    joined = balance_loss(route(logits, 2), padding_mask=mask)
    joined.backward()
    assert_close((first + second) / 2, joined.detach(), rtol=0, atol=1e-12)
    assert_close(torch.cat([first_grad, second_grad]) / 2, logits.grad, rtol=0, atol=1e-12)
    assert_close(balance_loss(route(logits, 2), scope="global"), balance_loss(route(logits, 2)))
