import math

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates import (
    GatedConv,
    GateMonitor,
    MoELayer,
    RoutingOutput,
    SoftmaxGate,
    StackedExperts,
    TopKGate,
)
from core_gates.moe.dispatch import DISPATCHES
from core_gates.monitor import hooks, routings
from core_gates.monitor import values as sums
from core_gates.monitor.routings import RoutingStatistics
from core_gates.monitor.values import ActivationStatistics, ValueStatistics


class Valve(nn.Module):
    """A gate that is not a routing gate."""

    calls = 0

    def forward(self, x, *, offset=0.0):
        return x * self.gate_values(x, offset=offset)

    def gate_values(self, x, *, offset=0.0):
        self.calls += 1
        return x + offset


class SelfCalling(nn.Module):
    def forward(self, x):
        return x

    def gate_values(self, x):
        return self(x)


def build_model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "top": TopKGate(4, 6, k=2),
            "all": nn.Sequential(SoftmaxGate(4, 3)),
            "conv": GatedConv(2, 4, 3, ndim=2),
            "plain": nn.Linear(4, 4),
        }
    )


def drive(model, x):
    for gate in (model["top"], model["all"][0]):
        gate(x)
    pixels = x[: x.shape[0] // 2 * 2, :2].reshape(-1, 2, 2, 1)
    model["conv"](pixels, pixels, 3 * pixels)


@pytest.fixture
def model():
    return build_model()


@pytest.mark.parametrize("name", ["standard_T24_E6_k2", "standard_T32_E8_k3"])
def test_golden_figures(golden, name):
    g = golden(name)
    num_experts = g["logits"].shape[-1]
    gate = TopKGate(num_experts, num_experts, k=int(g["k"]), renormalize=False, dtype=torch.float64)
    gate.weight.data.copy_(torch.eye(num_experts))
    with GateMonitor(gate) as monitor:
        gate(g["logits"])
    figures = monitor.compute()["TopKGate"]
    histograms = monitor.histograms()["TopKGate"]
    assert histograms["load"].tolist() == g["count"].tolist()
    assert_close(histograms["importance"], g["softmax_then_topk"].sum(0), rtol=0, atol=1e-10)
    assert figures["load_cv"] == pytest.approx(g["load_cv"].item(), abs=1e-10)
    assert figures["load_max_violation"] == pytest.approx(g["max_violation"].item(), abs=1e-10)
    assert figures["entropy"] == pytest.approx(g["entropy_mean"].item(), abs=1e-10)
    assert figures["importance_cv"] ** 2 == pytest.approx(g["importance_cv2"].item(), abs=1e-10)


def test_figures_of_a_small_routing():
    statistics = RoutingStatistics(4, bins=10)
    weights = torch.tensor([[0.75, 0.25], [0.55, 0.45], [1.0, 0.0]])
    indices = torch.tensor([[0, 1], [0, 1], [0, 2]])
    kept = torch.tensor([[True, True], [True, False], [True, False]])
    total = statistics.sums(RoutingOutput(weights, indices, kept, probs=torch.full((3, 4), 0.25)))
    figures = statistics.figures(total)
    assert (figures["tokens"], figures["active"]) == (3, pytest.approx(4 / 3))
    assert (figures["dropped"], figures["dead"]) == (pytest.approx(2 / 6), 2)
    assert figures["entropy"] == pytest.approx(math.log(4))
    assert (figures["captured"], figures["unrouted"]) == (pytest.approx((0.5 + 0.25 + 0.25) / 3), 0)
    assert "logit_rms" not in figures
    assert figures["load_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert figures["load_max_violation"] == pytest.approx(2)
    parts = statistics.distributions(total)
    assert (parts["load"].tolist(), parts["active"].tolist()) == ([3, 1, 0, 0], [0, 2, 1, 0, 0])
    assert parts["histogram"].tolist() == [0, 0, 1, 0, 0, 1, 0, 1, 0, 1]


def test_coactivation_counts_the_positions_that_use_both():
    statistics = RoutingStatistics(4)
    indices = torch.tensor([[0, 1], [1, 0], [0, 2], [3, 1]])
    kept = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    total = statistics.sums(RoutingOutput(torch.ones(4, 2), indices, kept))
    expected = [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert statistics.distributions(total)["coactivation"].tolist() == expected
    assert statistics.figures(total)["coactivation"] == pytest.approx(2 / 3)
    assert statistics_of(RoutingOutput(torch.ones(5, 3)))["coactivation"] == 1
    assert statistics_of(RoutingOutput(torch.eye(3)))["coactivation"] == 0


def statistics_of(routing):
    statistics = RoutingStatistics(routing.num_experts)
    return statistics.figures(statistics.sums(routing))


def test_many_experts_have_no_table_of_pairs():
    statistics = RoutingStatistics(257)
    total = statistics.sums(RoutingOutput(torch.ones(2, 257)))
    assert "coactivation" not in statistics.distributions(total)
    assert "coactivation" not in statistics.figures(total)
    assert statistics.figures(total)["active"] == 257


def test_unrouted_positions_and_the_size_of_logits():
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    logits = torch.tensor([[3.0, 1.0], [-torch.inf, 1.0], [1.0, torch.nan], [9.0, 9.0]])
    mask = torch.tensor([False, False, False, True])
    statistics = RoutingStatistics(2)
    figures = statistics.figures(statistics.sums(RoutingOutput(weights, logits=logits), mask))
    assert figures["unrouted"] == pytest.approx(1 / 3)
    assert figures["logit_rms"] == pytest.approx(((9 + 1 + 1 + 1) / 4) ** 0.5)


def test_sums_do_not_suffer_from_autocast():
    """Counts above 256 are not exact in bfloat16."""
    routing = RoutingOutput(torch.ones(1001, 3))
    with torch.autocast("cpu", torch.bfloat16):
        total = RoutingStatistics(3).sums(routing)
    assert (RoutingStatistics(3).distributions(total)["coactivation"] == 1001).all()


def test_churn_is_the_share_of_positions_whose_experts_change(refuses):
    gate = TopKGate(3, 3, k=2)
    gate.weight.data.copy_(torch.eye(3))
    x = torch.tensor([[3.0, 2, 1], [3, 1, 2], [1, 2, 3], [9, 9, 9], [1, 1, 1]])
    x[3] = torch.nan
    mask = torch.tensor([False, False, False, False, True])
    monitor = GateMonitor(gate)

    def probe(x):
        with monitor.probing():
            gate(x, padding_mask=mask)

    probe(x)
    assert monitor.compute()["TopKGate"] == {"tokens": 0.0, "non_finite": 0.0}
    # The order of the first token changes, the experts of the second, the third stays.
    probe(torch.cat([torch.tensor([[2.0, 3, 1], [3, 2, 1]]), x[2:]]))
    assert monitor.compute()["TopKGate"]["churn"] == pytest.approx(1 / 3)
    monitor.reset()
    probe(torch.cat([torch.tensor([[2.0, 3, 1], [3, 2, 1]]), x[2:]]))
    assert monitor.compute()["TopKGate"]["churn"] == 0
    refuses(ValueError, (r"use one fixed batch", lambda: probe_of_another_size(monitor, gate)))


def probe_of_another_size(monitor, gate):
    with monitor.probing():
        gate(torch.randn(2, 3))


def test_a_failed_probe_is_forgotten(model):
    monitor = GateMonitor(model)
    x = torch.randn(12, 4)
    with monitor.probing():
        drive(model, x)
    with pytest.raises(ValueError, match="must end in the 4 features"), monitor.probing():
        drive(model, -x[:, :3])
    drive(model, x)
    assert "churn" not in monitor.compute()["top"]
    with monitor.probing():
        drive(model, x)
    figures = monitor.compute()
    assert (figures["top"]["churn"], figures["top"]["tokens"]) == (0, 12)
    assert figures["conv"]["values"] == 48


def test_experts_are_measured_by_their_outputs():
    class Experts(nn.Module):
        def forward(self, x):
            return torch.stack([x.relu(), 100 * x + 1], -2)

    model = nn.ModuleDict({"experts": Experts(), "one": nn.ReLU()})
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    monitor = GateMonitor(model, experts={"experts": 2, "one": 1})
    monitor.begin_step(0)
    model["experts"](x)
    model["one"](x)
    figures, tables = monitor.compute(), monitor.histograms()
    zero = (x <= 0).double().mean().item()
    assert figures["experts"]["zero_rate"] == pytest.approx(zero / 2)
    assert figures["experts"]["zero_rate_max"] == pytest.approx(zero)
    assert figures["one"]["zero_rate"] == pytest.approx(zero)
    assert tables["experts"]["zero_rate"].tolist() == pytest.approx([zero, 0])
    stds = [t.double().std(correction=0).item() for t in (x.relu(), 100 * x + 1)]
    assert tables["experts"]["std"].tolist() == pytest.approx(stds)
    assert figures["experts"]["std_ratio"] == pytest.approx(stds[1] / stds[0])
    near = sum(
        (t.abs() < 0.05 * std).sum().item()
        for t, std in zip((x.relu(), 100 * x + 1), stds, strict=True)
    )
    assert figures["experts"]["near_zero_rate"] == pytest.approx(near / 400)
    assert figures["experts"]["activations"] == 400


def mixture(dispatch):
    """A layer whose expert e gives exact zeros in e features."""
    torch.manual_seed(0)
    layer = MoELayer(TopKGate(8, 5, k=2), StackedExperts(5, 8, 6, bias=True), dispatch=dispatch)
    nn.init.normal_(layer.gate.weight)
    for expert in range(5):
        layer.experts.down_proj.data[expert, :expert] = 0
    nn.init.ones_(layer.experts.gate_up_proj_bias)  # results of idle slots are not zero
    return layer


def routed_results(layer, x, weights):
    """For each expert, its results at the tokens that are routed to it."""
    results = []
    for expert in range(5):
        rows = [x[t] for t in range(len(x)) if weights[t, expert] != 0]
        results.append(layer.experts.single(torch.stack(rows), expert) if rows else x[:0])
    return [result.detach().double() for result in results]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("number", [12, 3])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_experts_of_a_layer_are_measured_where_they_are_used(dispatch, number, dense, grad):
    layer = mixture(dispatch)
    x = torch.randn(number, 8, generator=torch.Generator().manual_seed(1))
    routing = layer.gate(x, padding_mask=torch.arange(number) % 3 == 0)
    routing = routing._replace(kept=routing.kept & (routing.indices != 4))
    weights = routing.to_dense(5).weights
    with GateMonitor(layer, experts={"experts": 5}) as monitor, torch.set_grad_enabled(grad):
        layer(x, routing=routing.to_dense(5) if dense else routing)
    tables = monitor.histograms()["experts"]
    results = routed_results(layer, x, weights)
    used = [r for r in results if len(r)]
    assert len(results[4]) == 0 < len(used)
    figures = monitor.compute()["experts"]
    assert figures["activations"] == sum(r.numel() for r in used)
    near = [(r.abs() < 0.05 * r.std(correction=0)) | (r == 0) for r in used]
    assert figures["near_zero_rate"] == pytest.approx(torch.cat(near).double().mean().item())
    of_experts = [
        torch.stack([(r == 0).double().mean(), r.mean(), r.std(correction=0)]) for r in used
    ]
    found = torch.stack([tables[name] for name in ("zero_rate", "mean", "std")], 1)
    assert_close(found[[len(r) > 0 for r in results]], torch.stack(of_experts))


def test_experts_that_do_not_fit_are_refused(model, refuses):
    refuses(
        ValueError,
        (
            "'experts' has 5 experts, not 4",
            lambda: GateMonitor(mixture("sorted"), experts={"experts": 4}),
        ),
        (
            "experts names 'nothing', which is not a module",
            lambda: GateMonitor(model, experts={"nothing": 2}),
        ),
        ("experts names 'top', which is a gate", lambda: GateMonitor(model, experts={"top": 2})),
    )
    GateMonitor(model, experts={"plain": 3})
    with pytest.raises(ValueError, match=r"outputs \(5, 4\) must be \(\.\.\., 3, features\)"):
        model["plain"](torch.randn(5, 4))


def test_activations_that_are_not_finite_poison_nothing():
    statistics = ActivationStatistics(1)
    figures = statistics.figures(statistics.sums(torch.tensor([[1.0, torch.nan, -torch.inf, 3.0]])))
    assert (figures["activations"], figures["non_finite"]) == (2, 2)
    assert all(math.isfinite(v) for v in figures.values())
    assert statistics.figures(statistics.sums(torch.zeros(0, 3))) == {
        "activations": 0.0,
        "non_finite": 0.0,
    }


def test_entropy_is_absent_without_scores():
    statistics = RoutingStatistics(2)
    routing = RoutingOutput(torch.ones(3, 1), torch.tensor([[0], [1], [1]]))
    assert "entropy" not in statistics.figures(statistics.sums(routing))


def test_every_expert_closed_is_no_division_by_zero():
    statistics = RoutingStatistics(2)
    figures = statistics.figures(statistics.sums(RoutingOutput(torch.zeros(3, 2))))
    assert figures == {"tokens": 3.0, "non_finite": 0.0, "active": 0.0, "unrouted": 1.0}


def test_figures_of_values():
    statistics = ValueStatistics(bins=4)
    values = torch.tensor([0.0, 0.05, 0.3, 0.95, 1.0, torch.nan, torch.inf])
    total = statistics.sums(values)
    figures = statistics.figures(total)
    assert (figures["values"], figures["non_finite"]) == (5, 2)
    assert figures["mean"] == pytest.approx(0.46)
    assert figures["std"] == pytest.approx(values[:5].double().std(correction=0).item())
    assert (figures["zero"], figures["closed"], figures["open"]) == (0.2, 0.4, 0.4)
    assert total[-4:].tolist() == [2, 1, 0, 2]


def test_all_gates_of_a_model_are_measured(model):
    x = torch.randn(12, 4)
    monitor = GateMonitor(model)
    drive(model, x)
    figures = monitor.compute()
    assert set(figures) == {"top", "all.0", "conv"}
    assert (figures["top"]["active"], figures["all.0"]["active"]) == (2, 3)
    pixels = x[:, :2].reshape(-1, 2, 2, 1)
    gates = model["conv"].gate_values(pixels, pixels, 3 * pixels)
    assert figures["conv"]["mean"] == pytest.approx(gates.mean().item())
    assert figures["conv"]["values"] == gates.numel()
    assert all(isinstance(v, float) for gate in figures.values() for v in gate.values())
    assert monitor.histograms()["conv"]["histogram"].sum() == gates.numel()


@pytest.mark.fault("core A12")
def test_figures_where_the_device_has_no_float64(model, monkeypatch):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    figures = []
    for dtype in (torch.float64, torch.float32):
        for module in (hooks, routings, sums):
            monkeypatch.setattr(module, "widest_float", lambda _device, dtype=dtype: dtype)
        with GateMonitor(model, experts={"plain": 1}) as monitor:
            drive(model, x)
            model["plain"](x)
            assert {total.dtype for total in monitor._totals.values()} == {dtype}
            figures.append(monitor.compute())
    assert figures[0]["top"]["tokens"] == 40
    assert_close(figures[1], figures[0], rtol=1e-4, atol=1e-5)


def test_observations_add_up(model):
    x = torch.randn(12, 4)
    monitor = GateMonitor(model)
    drive(model, x)
    once = monitor.compute()
    monitor.reset()
    drive(model, x[:4])
    drive(model, x[4:])
    assert_close(monitor.compute(), once, rtol=1e-6, atol=1e-9)


def test_padding_is_left_out():
    gate = TopKGate(4, 6)
    x, mask = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3:] = True
    monitor = GateMonitor(gate)
    gate(x.masked_fill(mask.unsqueeze(-1), torch.nan), padding_mask=mask)
    padded = monitor.compute()
    monitor.reset()
    gate(x[:, :3])
    # Sums of other lengths are taken in another order.
    assert padded["TopKGate"] == pytest.approx(monitor.compute()["TopKGate"], rel=1e-12, abs=0)
    assert padded["TopKGate"]["tokens"] == 6


def test_positions_that_are_not_finite_are_counted_and_poison_nothing():
    gate = SoftmaxGate(4, 3)
    x = torch.randn(5, 4)
    x[2] = torch.nan
    monitor = GateMonitor(gate)
    gate(x)
    figures = monitor.compute()["SoftmaxGate"]
    assert (figures["tokens"], figures["non_finite"]) == (4, 1)
    assert all(math.isfinite(v) for v in figures.values())
    monitor.reset()
    gate(x[2:3])
    assert monitor.compute()["SoftmaxGate"] == {"tokens": 0.0, "non_finite": 1.0}


def test_only_sampled_steps_are_measured():
    valve = Valve()
    monitor = GateMonitor(valve, every=3)
    for step in range(7):
        monitor.begin_step(step)
        valve(torch.full((1,), step / 10))
    figures = monitor.compute()["Valve"]
    assert (figures["values"], figures["mean"]) == (3, pytest.approx((0.0 + 0.3 + 0.6) / 3))
    assert valve.calls == 7 + 3


def test_keyword_inputs_reach_gate_values():
    valve = Valve()
    monitor = GateMonitor(valve)
    valve(torch.zeros(4), offset=0.25)
    assert monitor.compute()["Valve"]["mean"] == 0.25


def test_gate_values_may_call_their_own_module():
    module = SelfCalling()
    monitor = GateMonitor(module)
    module(torch.full((3,), 0.5))
    assert monitor.compute()["SelfCalling"]["values"] == 3


def test_gradients_and_random_numbers_are_not_touched(model):
    x = torch.randn(12, 4)
    expected = torch.autograd.grad(model["top"](x).weights.square().sum(), model["top"].weight)
    state = torch.get_rng_state()
    monitor = GateMonitor(model)
    drive(model, x)
    actual = torch.autograd.grad(model["top"](x).weights.square().sum(), model["top"].weight)
    assert_close(actual, expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert monitor.compute()["top"]["tokens"] == 24


def test_checkpointed_passes_are_measured_once():
    gate, valve, x = TopKGate(4, 3), Valve(), torch.rand(5, 4, requires_grad=True)
    with GateMonitor(nn.ModuleList([gate, valve])) as monitor:
        y = checkpoint(lambda x: gate(valve(x)).weights.exp(), x, use_reentrant=False)
        y.square().sum().backward()
    figures = monitor.compute()
    assert (figures["0"]["tokens"], figures["1"]["values"]) == (5, 20)


def test_closing_removes_the_hooks_and_keeps_the_figures(model):
    with GateMonitor(model) as monitor:
        drive(model, torch.randn(4, 4))
    before = monitor.compute()
    drive(model, torch.randn(4, 4))
    assert monitor.compute() == before
    assert not any(m._forward_hooks for m in model.modules())


def test_models_without_gates_and_gates_that_never_ran(refuses, model):
    assert GateMonitor(nn.Linear(2, 2)).compute(all_reduce=True) == {}
    assert GateMonitor(model["top"]).compute() == {"TopKGate": {"tokens": 0.0, "non_finite": 0.0}}
    refuses(ValueError, ("every must be at least 1, got 0", lambda: GateMonitor(model, every=0)))


def monitors_of_rank(x, splits):
    return [monitor_of_rank(x, sizes) for sizes in splits]


def monitor_of_rank(x, sizes):
    model = build_model()
    monitor = GateMonitor(model)
    start = sum(sizes[: dist.get_rank()])
    mine = x[start : start + sizes[dist.get_rank()]]
    for sign in (1, -1):
        with monitor.probing():
            model["top"](sign * mine)
    if len(mine):
        drive(model, mine)
    histograms = monitor.histograms(all_reduce=True)
    return monitor.compute(all_reduce=True), histograms, monitor.compute()["top"]["tokens"]


def test_sums_of_two_ranks_equal_one_process(ranks, model):
    splits = [[10, 2], [12, 0]]
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(7))
    monitor = GateMonitor(model)
    for sign in (1, -1):
        with monitor.probing():
            model["top"](sign * x)
    drive(model, x)
    assert monitor.compute()["top"]["churn"] > 0
    for rank, found in enumerate(ranks(monitors_of_rank, x, splits)):
        for (figures, histograms, local), sizes in zip(found, splits, strict=True):
            assert_close(figures, monitor.compute(), rtol=1e-6, atol=1e-9)
            assert_close(histograms, monitor.histograms(), rtol=1e-6, atol=1e-9)
            assert local == sizes[rank]
