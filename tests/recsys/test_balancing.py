import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from recsys.balancing import BALANCERS, balancer, project


def losses_of(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_fixed_is_the_sum():
    losses = losses_of([1.0, 2.0, 5.0])
    made = balancer("fixed", 3)
    assert (made(losses), made.weights.tolist()) == (8, [1, 1, 1])


def test_uncertainty():
    """Value, gradient, and the optimum ``e^s = 2 L``, which gradient descent finds."""
    made = balancer("uncertainty", 2).double()
    losses = losses_of([0.3, 2.0])
    with torch.no_grad():
        made.log_variance.copy_(torch.tensor([0.5, -1.0]))
    total = made(losses)
    wanted = math.exp(-0.5) * 0.3 + math.exp(1) * 2 + (0.5 - 1) / 2
    assert_close(total.item(), wanted)
    total.backward()
    assert_close(losses.grad, made.weights)
    slope = [-math.exp(-0.5) * 0.3 + 0.5, -math.exp(1) * 2 + 0.5]
    assert_close(made.log_variance.grad.tolist(), slope)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        made(losses.detach()).backward()
        optimizer.step()
    assert_close(made.log_variance.exp().tolist(), [0.6, 4.0])


@pytest.mark.fault("video R4")
@pytest.mark.parametrize("told", [True, False])
def test_uncertainty_learns_from_batches_in_which_a_task_counts(told):
    made = balancer("uncertainty", 3).double()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    for step in range(90):
        counted = torch.tensor([True, step % 3 == 0, False])
        losses = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64) * counted
        optimizer.zero_grad()
        total = made(losses, counted=counted if told else None)
        s = made.log_variance[counted]
        assert_close(total, ((-s).exp() * losses[counted] + s / 2).sum())
        total.backward()
        optimizer.step()
    assert_close(made.log_variance.exp().tolist(), [0.6, 0.6, 1.0], rtol=1e-3, atol=0)


def test_pcgrad_of_two_conflicting_vectors():
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    found = project(g)
    assert_close(found[0], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert_close(found[1], torch.tensor([0.0, 1.0], dtype=torch.float64))
    agreeing = g.abs()
    assert torch.equal(project(agreeing), agreeing)


def test_pcgrad_one_after_the_other():
    """The order matters with three tasks; each projection is on the original of the other."""
    g = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    orders = [[2, 1], [0, 2], [1, 0]]
    found = project(g, orders)
    for task, order in enumerate(orders):
        wanted = g[task].clone()
        for other in order:
            along = wanted @ g[other]
            if along < 0:
                wanted -= along / g[other].square().sum() * g[other]
        assert_close(found[task], wanted)
    assert not torch.allclose(found, project(g, [[1, 2], [2, 0], [0, 1]]))


def test_pcgrad_bends_the_gradient_of_shared_rows_alone():
    made = balancer("pcgrad", 2)
    p = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    q = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    directions = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    losses = directions @ p[1] + torch.stack([q * p[0, 0], -3 * q])
    total = made(losses, shared=[(p, slice(1, None))])
    assert_close(total, losses.sum())
    total.backward()
    assert_close(p.grad[1], torch.tensor([0.5, 1.5], dtype=torch.float64))
    assert_close(p.grad[0], torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert_close(q.grad.item(), 1.0 - 3.0)
    assert made.eval()(losses) == losses.sum()


def test_networks_without_shared_layers_are_refused():
    with pytest.raises(GatesError, match=r"this network has none; choose\s+another balancing"):
        balancer("pcgrad", 2)(losses_of([1.0, 2.0]))


@pytest.mark.parametrize("name", ["pcgrd", "PCGrad"])
def test_mistakes_are_one_line(name):
    with pytest.raises(GatesError, match=f"balancing is '{name}' .did you mean 'pcgrad'"):
        balancer(name, 2)


def test_weights_have_no_gradient():
    for name in BALANCERS:
        assert not balancer(name, 3).weights.requires_grad
        assert balancer(name, 3).weights.shape == (3,)
