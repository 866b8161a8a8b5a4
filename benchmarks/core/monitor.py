"""What watching a gate costs: training steps with and without a monitor."""

import copy
from collections.abc import Mapping

import torch

from benchmarks.comparison import Call, Comparison, Load

TOKENS, DIM, HIDDEN, EXPERTS, K = 1024, 128, 256, 16, 2
STEPS = 100
SINGLE_CALLS = 16
BAR = 1.02


def monitored() -> Comparison:
    """Return a step of an expert layer, alone and with a monitor that measures one in a hundred.

    The steps are timed one by one, alternating, since samples of many differ by more than the
    monitor.
    """

    def build(load: Load) -> Mapping[str, Call]:
        torch.manual_seed(0)
        gate = load("core_gates.gates.top_k").TopKGate(DIM, EXPERTS, k=K)
        experts = load("core_gates.moe.experts").StackedExperts(EXPERTS, DIM, HIDDEN)
        layer = load("core_gates.moe.layer").MoELayer(gate, experts, return_routing=False)
        inputs = list(layer.parameters())
        watched = copy.deepcopy(layer, {id(p): p for p in inputs})  # the same parameters
        monitor = load("core_gates.monitor.hooks").GateMonitor(watched, every=STEPS)
        x = torch.randn(TOKENS, DIM)

        def step(model: torch.nn.Module) -> None:
            torch.autograd.grad(model(x).sum(), inputs)

        def passed_over() -> None:
            monitor.begin_step(1)
            step(watched)

        def measured() -> None:
            monitor.begin_step(0)
            step(watched)
            monitor.compute()

        calls = {"alone": lambda: step(layer)}
        return calls | {"step passed over": passed_over, "step measured": measured}

    return Comparison(
        name=f"MoE of {EXPERTS}, forward+backward, one step in {STEPS} measured",
        op="monitor",
        build=build,
        baseline="alone",
        bars={"GateMonitor": BAR},
        mixtures={"GateMonitor": {"step passed over": 1 - 1 / STEPS, "step measured": 1 / STEPS}},
        single_calls=SINGLE_CALLS,
        unit="step",
    )
