"""What watching a gate costs: training steps with and without a monitor."""

from collections.abc import Mapping

import torch

from benchmarks.registry import Call, Comparison, Load

TOKENS, DIM, HIDDEN, EXPERTS, K = 1024, 128, 256, 16, 2
STEPS = 100
BAR = 1.02


def monitored() -> Comparison:
    """Return a hundred steps of an expert layer, alone and with one of them measured."""

    def build(load: Load) -> Mapping[str, Call]:
        torch.manual_seed(0)
        gate = load("core_gates.gates.top_k").TopKGate(DIM, EXPERTS, k=K)
        experts = load("core_gates.experts").StackedExperts(EXPERTS, DIM, HIDDEN)
        layer = load("core_gates.moe").MoELayer(gate, experts, return_routing=False)
        monitor_of = load("core_gates.monitor").GateMonitor
        x = torch.randn(TOKENS, DIM)
        inputs = list(layer.parameters())

        def step() -> None:
            torch.autograd.grad(layer(x).sum(), inputs)

        def alone() -> None:
            for _ in range(STEPS):
                step()

        def watched() -> None:
            with monitor_of(layer, every=STEPS) as monitor:
                for number in range(STEPS):
                    monitor.begin_step(number)
                    step()
                monitor.compute()

        return {"alone": alone, "GateMonitor": watched}

    return Comparison(
        name=f"MoE of {EXPERTS}, forward+backward, one step in {STEPS} measured",
        op="monitor",
        build=build,
        baseline="alone",
        bars={"GateMonitor": BAR},
        units=dict.fromkeys(("alone", "GateMonitor"), STEPS),
        unit="step",
    )
