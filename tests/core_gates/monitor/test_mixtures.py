"""The mean weights of gates that mix one set of experts."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates import GateMonitor, MaskedMixture, MultiGate, NormedExperts, SoftmaxGate, TopKGate
from core_gates.monitor.values import MixtureStatistics

DIM = 6
MASK = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
OWN = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_matrix_of_a_masked_mixture_is_that_of_its_gates_alone():
    mixture = MaskedMixture(DIM, MASK, self_mask=OWN)
    nn.init.normal_(mixture.weight)
    with GateMonitor(nn.Sequential(mixture)) as monitor:
        batches = [drawn(7, DIM), drawn(4, DIM, seed=1)]
        for x in batches:
            mixture(x, drawn(len(x), 5, 3))
        (figures,), (shown,) = monitor.compute().values(), monitor.histograms().values()
    expected = mixture.weights(torch.cat(batches), residual=False).double().mean(0)
    assert_close(shown["matrix"], expected, rtol=1e-5, atol=1e-6)
    assert_close(shown["matrix"].sum(-1), torch.ones(3, dtype=torch.float64))
    assert not shown["matrix"][~MASK].any()
    assert shown["histogram"].sum() == figures["values"] == 11 * len(mixture.weight)
    assert figures["mixed"] == 11
    assert_close(figures["largest_mean_weight"], expected.max().item())
    entropy = torch.special.entr(expected).sum(-1).mean().item()
    assert_close(figures["mixture_entropy"], entropy, rtol=1e-5, atol=1e-6)


def test_extremes():
    """A uniform gate, and one that uses a single expert: closed forms."""
    statistics = MixtureStatistics(2, 4)
    weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]]).expand(10, 2, 4)
    figures = statistics.figures(statistics.sums(weights))
    assert_close(figures["mixture_entropy"], math.log(4) / 2)
    assert (figures["largest_mean_weight"], figures["dead_experts"]) == (1, 0)
    lone = torch.tensor([[0.995, 0.005, 0, 0], [1.0, 0, 0, 0]]).expand(10, 2, 4)
    assert statistics.figures(statistics.sums(lone))["dead_experts"] == 3


def test_padding_and_what_is_not_finite_do_not_count():
    statistics = MixtureStatistics(1, 2)
    weights = torch.tensor([[[0.2, 0.8]], [[0.6, 0.4]], [[torch.nan, 0.1]], [[0.0, 0.0]]])
    total = statistics.sums(weights, torch.tensor([False, False, False, True]))
    figures = statistics.figures(total)
    assert (figures["mixed"], figures["mixed_non_finite"]) == (2, 1)
    assert_close(statistics.distributions(total)["matrix"], torch.tensor([[0.4, 0.6]]).double())
    assert statistics.figures(torch.zeros_like(total)) == {"mixed": 0, "mixed_non_finite": 0}


@pytest.mark.parametrize("compiled", [False, True])
def test_any_routing_gates(compiled):
    gates = [SoftmaxGate(DIM, 4), TopKGate(DIM, 5, k=2)]
    mixture = MultiGate(gates, torch.tensor([[True, False, True, True, True], [True] * 5]))
    monitor = GateMonitor(nn.Sequential(mixture))
    run = torch.compile(mixture, backend="eager") if compiled else mixture
    x, padded = drawn(7, DIM), torch.tensor([False] * 6 + [True])
    with torch.no_grad():
        run(x, drawn(7, 5, 3), padding_mask=padded)
    expected = mixture.weights(x[:6]).double().mean(0)
    assert_close(monitor.histograms()["0"]["matrix"], expected, rtol=1e-5, atol=1e-6)
    assert (monitor.compute()["0"]["mixed"], monitor.compute()["0.gates.1"]["active"]) == (6, 2)
    assert "| 0 " in monitor.report().table()
    monitor.close()


def test_outputs_of_an_expert_with_several_inputs_count_as_one():
    experts = NormedExperts([1, 1], DIM, [4], runs=[1, 2], norm=None)
    monitor = GateMonitor(nn.Sequential(experts), experts={"0": 2})
    outputs = experts(drawn(9, 3, DIM)).detach()
    zero = monitor.histograms()["0"]
    assert_close(zero["mean"][1].float(), outputs[:, 1:].mean())
    assert_close(zero["mean"][0].float(), outputs[:, 0].mean())
