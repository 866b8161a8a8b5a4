import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from recsys.balancing import BALANCERS, balancer, project

EVERYTHING = slice(None)


def losses_of(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_fixed_is_the_sum():
    losses = losses_of([1.0, 2.0, 5.0])
    made = balancer("fixed", {}, 3)
    assert made(losses) == 8
    assert made.weights.tolist() == [1, 1, 1]


def test_uncertainty():
    """Value, gradient, and the optimum ``e^s = 2 L``, which gradient descent finds."""
    made = balancer("uncertainty", {}, 2).double()
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


def test_dwa():
    """Ratios of the means of the two epochs before; ones until there are two."""
    made = balancer("dwa", {"tau": 0.5}, 2)
    for epoch in ([[1.0, 4.0], [3.0, 4.0]], [[1.0, 3.0]]):
        for values in epoch:
            assert made(losses_of(values)) == sum(values)
        made.end_epoch()
    r = [1 / 2, 3 / 4]
    scale = 2 / sum(math.exp(x / 0.5) for x in r)
    weights = [scale * math.exp(x / 0.5) for x in r]
    assert_close(made.weights.tolist(), weights)
    assert_close(made.weights.sum().item(), 2.0)
    losses = losses_of([1.0, 2.0])
    made(losses).backward()
    assert_close(losses.grad.tolist(), weights)


def test_dwa_by_batches_survives_a_restart():
    first = balancer("dwa", {"period": 2}, 2)
    for values in ([1.0, 4.0], [3.0, 4.0], [1.0, 2.0]):
        first(losses_of(values))
    second = balancer("dwa", {"period": 2}, 2)
    second.load_state_dict(first.state_dict())
    for made in (first, second):
        made(losses_of([1.0, 4.0]))
        made.end_epoch()  # changes nothing
    assert first.weights.tolist() != [1, 1]
    assert torch.equal(first.weights, second.weights)


def test_dwa_learns_nothing_in_evaluation():
    made = balancer("dwa", {"period": 1}, 2).eval()
    made(losses_of([1.0, 4.0]))
    assert made.periods == 0


@pytest.mark.fault("video R4")
def test_dwa_of_tasks_that_do_not_always_count():
    """Means are over the batches in which a task counts; an empty period gives the ratio 1."""
    made = balancer("dwa", {"period": 2}, 3)
    made(losses_of([0.6, 0.5, 0.4]))
    made(losses_of([0.4, 0.0, 0.0]), counted=torch.tensor([True, False, False]))
    for _ in range(2):
        made(losses_of([0.4, 0.25, 0.0]))  # without being told: a loss of 0 does not count
    assert_close(made.means[1].tolist(), [0.5, 0.5, 0.4])
    wanted = torch.tensor([0.8, 0.5, 1.0], dtype=torch.float64)
    assert_close(made.weights, 3 * (wanted / 2).softmax(0))
    for _ in range(2):
        made(losses_of([0.2, 0.25, 0.3]))
    wanted = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    assert_close(made.weights, 3 * (wanted / 2).softmax(0))


@pytest.mark.fault("video R4")
@pytest.mark.parametrize("told", [True, False])
def test_uncertainty_learns_from_batches_in_which_a_task_counts(told):
    made = balancer("uncertainty", {}, 3).double()
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


def quadratic(scales):
    """Losses ``a_t (w - 1)²`` of one shared weight."""
    w = nn.Parameter(torch.tensor([0.0, 9.0], dtype=torch.float64))
    losses = torch.stack([a * (w[0] - 1) ** 2 for a in scales])
    return w, losses


def test_gradnorm():
    """Two steps by hand: norms ``2 a_t |w - 1|``, no pull by rates at first."""
    scales, lr = (1.0, 4.0), 0.05
    made = balancer("gradnorm", {"alpha": 1.5, "learning_rate": lr}, 2).double()
    w, losses = quadratic(scales)
    total = made(losses, [(w, slice(0, 1))])
    assert total == 5
    total.backward(retain_graph=True)  # with the weights of then
    assert w.grad[0] == -2 * (1 + 4)
    norms = [2.0, 8.0]
    moved = [1 + lr * norms[0] / 5, 1 - lr * norms[1] / 5]  # G = (2, 8), mean 5: up, down
    wanted = [m * 2 / sum(moved) for m in moved]
    assert_close(made.weights.tolist(), wanted)
    # The second loss has halved, the first has not: its rate is high, its target, too.
    second = torch.stack([losses[0], losses[1] / 2])
    total = made(second, [(w, slice(0, 1))])
    assert_close(total.item(), wanted[0] * 1 + wanted[1] * 2)
    rates = [1 / 0.75, 0.5 / 0.75]
    g = [wanted[0] * 2, wanted[1] * 4]
    targets = [sum(g) / 2 * r**1.5 for r in rates]
    norms = [2.0, 4.0]
    pairs = zip(wanted, g, targets, norms, strict=True)
    moved = [a - lr * n / 3 * math.copysign(1, b - c) for a, b, c, n in pairs]
    assert_close(made.weights.tolist(), [m * 2 / sum(moved) for m in moved])


def test_gradnorm_does_not_depend_on_the_scale_of_the_losses():
    made = [balancer("gradnorm", {}, 2).double() for _ in range(2)]
    for one, scale in zip(made, (1.0, 1000.0), strict=True):
        w, losses = quadratic((scale, 4 * scale))
        one(losses, [(w, EVERYTHING)])
    assert_close(made[0].weights, made[1].weights)
    assert made[0].weights[0] > made[0].weights[1]


def test_gradnorm_evens_out_the_norms_at_the_shared_rows():
    made = balancer("gradnorm", {"alpha": 0.0, "learning_rate": 0.005}, 3).double()
    scales = (1.0, 5.0, 25.0)
    for _ in range(800):
        w, losses = quadratic(scales)
        made(losses, [(w, slice(0, 1))])
    g = made.weights * torch.tensor(scales, dtype=torch.float64)
    assert g.max() / g.min() < 1.3
    assert_close(made.weights.sum().item(), 3.0)
    before = made.weights.clone()
    made.eval()(losses, [(w, EVERYTHING)])
    assert torch.equal(made.weights, before)


@pytest.mark.fault("video R2")
@pytest.mark.parametrize("told", [True, False])
def test_gradnorm_of_tasks_that_do_not_always_count(told):
    """The others move as if they were alone; L(0) is the first loss that there is."""
    options = {"alpha": 1.5, "learning_rate": 0.05}
    made, alone = (balancer("gradnorm", options, n).double() for n in (3, 2))
    for scales in ((1.0, 4.0, 0.0), (3.0, 1.0, 0.0)):
        counted = torch.tensor([s > 0 for s in scales]) if told else None
        w, losses = quadratic(scales)
        made(losses, [(w, slice(0, 1))], counted=counted)
        alone(losses[:2], [(w, slice(0, 1))])
        assert_close(made.weights, torch.cat([alone.weights, torch.ones(1).double()]))
    assert (made.weights[:2] - 1).abs().min() > 0.01
    assert made.started.tolist() == [True, True, False]
    w, losses = quadratic((2.0, 2.0, 5.0))
    made(losses, [(w, slice(0, 1))])
    assert_close(made.first.tolist(), [1.0, 4.0, 5.0])
    assert_close(made.weights.sum().item(), 3.0)
    before = made.weights.clone()
    w, losses = quadratic((0.0, 0.0, 0.0))
    made(losses, [(w, slice(0, 1))])
    assert torch.equal(made.weights, before)


@pytest.mark.fault("video R2")
@pytest.mark.parametrize("absent", [[], [0], [0, 1, 2, 9]])
def test_gradnorm_gives_no_task_everything(absent):
    made = balancer("gradnorm", {}, 3).double()
    for step in range(200):
        w, losses = quadratic((1.0, 1.0, 0.0 if step in absent else 1.0))
        made(losses * 0.99**step, [(w, slice(0, 1))])
    assert_close(made.weights, torch.ones(3).double(), rtol=0.2, atol=0)


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
    made = balancer("pcgrad", {}, 2)
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


@pytest.mark.parametrize("name", ["gradnorm", "pcgrad"])
def test_networks_without_shared_layers_are_refused(name):
    with pytest.raises(GatesError, match=r"this network has none; choose\s+another balancing"):
        balancer(name, {}, 2)(losses_of([1.0, 2.0]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fixd", {}, "balancing is 'fixd' .did you mean 'fixed'"),
        ("GradNorm", {}, "did you mean 'gradnorm'"),
        ("gradnorm", {"apha": 1}, "gradnorm has no option 'apha'; it has only alpha, l"),
        ("fixed", {"alpha": 1}, "fixed has no option 'alpha'; it has none"),
        ("dwa", {"tau": 0}, "balancing dwa: tau must be positive, got 0"),
        ("gradnorm", {"alpha": -1}, "alpha must not be negative"),
    ],
)
def test_mistakes_are_one_line(name, options, message):
    with pytest.raises(GatesError, match=message) as caught:
        balancer(name, options, 2)
    assert "\n" not in str(caught.value)


def test_weights_have_no_gradient():
    for name in BALANCERS:
        assert not balancer(name, {}, 3).weights.requires_grad
        assert balancer(name, {}, 3).weights.shape == (3,)
