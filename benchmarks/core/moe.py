"""The expert layer against a dense network of equal work, other layers, and the memory's limit."""

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Load, Work, load_head
from core_gates import Gate, StackedExperts

WATCHED_TOKENS, WATCHED_DIM, WATCHED_HIDDEN, WATCHED_EXPERTS, WATCHED_K = 1024, 128, 256, 16, 2
WATCHED_STEPS = 100
SINGLE_CALLS = 16
WATCHED_BAR = 1.02


def monitored() -> Comparison:
    """Return a step of an expert layer, alone and with a monitor that measures one in a hundred.

    The steps are timed one by one, alternating, since samples of many differ by more than the
    monitor.
    """

    def build(load: Load) -> Mapping[str, Call]:
        torch.manual_seed(0)
        gate = load("core_gates.gates.top_k").TopKGate(WATCHED_DIM, WATCHED_EXPERTS, k=WATCHED_K)
        experts = load("core_gates.moe.experts").StackedExperts(
            WATCHED_EXPERTS, WATCHED_DIM, WATCHED_HIDDEN
        )
        layer = load("core_gates.moe.layer").MoELayer(gate, experts, return_routing=False)
        inputs = list(layer.parameters())
        watched = copy.deepcopy(layer, {id(p): p for p in inputs})  # the same parameters
        monitor = load("core_gates.monitor.hooks").GateMonitor(watched, every=WATCHED_STEPS)
        x = torch.randn(WATCHED_TOKENS, WATCHED_DIM)

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
        name=f"MoE of {WATCHED_EXPERTS}, forward+backward, one step in {WATCHED_STEPS} measured",
        op="monitor",
        build=build,
        baseline="alone",
        bars={"GateMonitor": WATCHED_BAR},
        mixtures={
            "GateMonitor": {
                "step passed over": 1 - 1 / WATCHED_STEPS,
                "step measured": 1 / WATCHED_STEPS,
            }
        },
        single_calls=SINGLE_CALLS,
        unit="step",
    )


class NaiveLoop(nn.Module):
    """One expert after the other, ``weight[e]`` indexed, results added where they belong."""

    def __init__(self, gate: Gate, experts: StackedExperts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to rows (T, D)."""
        routing = self.gate(x)
        y = torch.zeros_like(x)
        for expert in range(self.experts.num_experts):
            token, choice = (routing.indices == expert).nonzero(as_tuple=True)
            out = self.experts.single(x[token], expert)
            y = y.index_add(0, token, out * routing.weights[token, choice].unsqueeze(-1))
        return y


class GroupedMm(nn.Module):
    """The way of torchtitan: sort, two ``grouped_mm``, scale, add to where the rows came from."""

    def __init__(self, gate: Gate, experts: StackedExperts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to rows (T, D)."""
        routing = self.gate(x)
        chosen = routing.indices.flatten()
        order = chosen.argsort(stable=True)
        token = order // routing.indices.shape[-1]
        counts = torch.bincount(chosen, minlength=self.experts.num_experts)
        offsets = counts.cumsum(0, dtype=torch.int32)
        up, down = self.experts.get_parameter("up_proj"), self.experts.down_proj
        hidden = F.silu(F.grouped_mm(x[token], up.mT, offs=offsets))
        out = F.grouped_mm(hidden, down.mT, offs=offsets)
        out = out * routing.weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, out)


class Transformers(nn.Module):
    """The experts of Mixtral in transformers, after the same gate and with the same weights."""

    def __init__(self, gate: Gate, experts: StackedExperts, implementation: str) -> None:
        super().__init__()
        transformers: Any = importlib.import_module("transformers")
        mixtral: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
        config = transformers.MixtralConfig(
            hidden_size=experts.dim,
            intermediate_size=experts.hidden_dim,
            num_local_experts=experts.num_experts,
        )
        config._experts_implementation = implementation
        self.gate, self.experts = gate, mixtral.MixtralExperts(config)
        self.experts.load_state_dict(experts.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to rows (T, D)."""
        routing = self.gate(x)
        return cast(Tensor, self.experts(x, routing.indices, routing.weights))


def has_transformers() -> bool:
    """Return whether the library can be imported."""
    return importlib.util.find_spec("transformers") is not None


TOKENS, DIM, HIDDEN, K = 4096, 512, 1024, 2
FORWARD_BARS = {16: 1 / 0.95, 64: 1 / 0.85}
TRAINING_BARS = {16: 1 / 0.85, 64: 1 / 0.72}
NAIVE_BAR, ROUTER_BAR = 1 / 10, 0.015
DECODE_BARS = {"eager": 1 / 0.5, "compile": 1 / 0.8}
DECODE_STEPS = {1: 32, 16: 4, 64: 2}
"""Steps of a call by batch: together they read more weights than a cache holds."""

_REMEDY = "not installed: pip install transformers"


def comparisons() -> Iterator[Comparison]:
    """All comparisons of the expert layer; on one CPU thread."""
    for num_experts in FORWARD_BARS:
        yield against_dense(num_experts, backward=False)
        yield against_dense(num_experts, backward=True)
    yield against_naive(64)
    for num_experts in FORWARD_BARS:
        yield router_share(num_experts)
    for backward in (False, True):
        yield against_transformers(64, backward)
    for batch in DECODE_STEPS:
        yield decode(batch)
    yield monitored()


def against_dense(num_experts: int, backward: bool) -> Comparison:
    """Return the layer, one of ``grouped_mm``, and the dense network of equal work."""

    def build(load: Load) -> Mapping[str, Call]:
        x, layer = _layer(load, num_experts, gated=False)
        width = K * HIDDEN + num_experts // 2
        dense = nn.Sequential(
            nn.Linear(DIM, width, bias=False), nn.SiLU(), nn.Linear(width, DIM, bias=False)
        )
        peer = GroupedMm(layer.gate, layer.experts)
        models = {"dense": dense, "MoELayer": layer, "grouped_mm": peer}
        return {name: _call(model, x, backward) for name, model in models.items()}

    flops = 4.0 * TOKENS * K * DIM * HIDDEN + 2.0 * TOKENS * DIM * num_experts
    return Comparison(
        name=f"MoE of {num_experts}, {'forward+backward' if backward else 'forward'}",
        op="moe",
        build=build,
        baseline="dense",
        bars={"MoELayer": (TRAINING_BARS if backward else FORWARD_BARS)[num_experts]},
        work=Work(flops=flops * (3 if backward else 1)),
        memory=4.0 * 6 * num_experts * DIM * HIDDEN,
    )


def against_naive(num_experts: int) -> Comparison:
    """Return forward and backward of the layer and of a loop over indexed weights."""

    def build(load: Load) -> Mapping[str, Call]:
        x, layer = _layer(load, num_experts, gated=False)
        naive = NaiveLoop(layer.gate, layer.experts)
        return {name: _call(m, x, True) for name, m in (("naive loop", naive), ("MoELayer", layer))}

    return Comparison(
        name=f"MoE of {num_experts}, forward+backward, against a loop",
        op="moe",
        build=build,
        baseline="naive loop",
        bars={"MoELayer": NAIVE_BAR},
        memory=4.0 * 10 * num_experts * DIM * HIDDEN,
    )


def router_share(num_experts: int) -> Comparison:
    """Return softmax, top-k and scaling alone, and the forward pass of the whole layer."""

    def build(load: Load) -> Mapping[str, Call]:
        x, layer = _layer(load, num_experts, gated=False)
        router = load("core_gates.ops.router.op").router
        logits = torch.randn(TOKENS, num_experts)

        def route() -> object:
            with torch.no_grad():
                return router(logits, K)

        return {"MoELayer": _call(layer, x, False), "router": route}

    return Comparison(
        name=f"router of {num_experts} within its layer",
        op="router",
        build=build,
        baseline="MoELayer",
        bars={"router": ROUTER_BAR},
    )


def against_transformers(num_experts: int, backward: bool) -> Comparison:
    """Return the layer with gated experts and the experts of Mixtral in transformers."""
    modes = {"transformers eager": "eager", "transformers grouped": "grouped_mm"}

    def build(load: Load) -> Mapping[str, Call]:
        x, layer = _layer(load, num_experts, gated=True)
        models: dict[str, nn.Module] = {"MoELayer": layer}
        if has_transformers():
            for name, mode in modes.items():
                models[name] = Transformers(layer.gate, layer.experts, mode)
        return {name: _call(model, x, backward) for name, model in models.items()}

    return Comparison(
        name=f"gated MoE of {num_experts}, {'forward+backward' if backward else 'forward'}",
        op="moe",
        build=build,
        baseline="transformers eager",
        absent={} if has_transformers() else dict.fromkeys(modes, _REMEDY),
        memory=4.0 * 20 * num_experts * DIM * HIDDEN,
    )


def decode(batch: int, num_experts: int = 64) -> Comparison:
    """Return steps of a small batch, and a copy of as many bytes as they must read."""
    steps = DECODE_STEPS[batch]
    experts_read = _experts_read(batch, num_experts)
    num_bytes = experts_read * 2 * DIM * HIDDEN * 4

    def build(load: Load) -> Mapping[str, Call]:
        _, layer = _layer(load, num_experts, gated=False)
        batches = _batches(batch)
        compiled = torch.compile(layer, dynamic=False)
        source = torch.rand(num_bytes // 8)
        target = torch.empty_like(source)
        kernels = load("core_gates.ops").kernels

        def run(model: Callable[[Tensor], object], mode: str) -> Call:
            def call() -> None:
                with torch.no_grad(), kernels(mode):
                    for x in batches:
                        model(x)

            return call

        return {
            "memory": lambda: target.copy_(source),
            "eager": run(layer, "reference"),
            "compile": run(compiled, "compile"),
        }

    return Comparison(
        name=f"MoE of {num_experts}, decode of batch {batch}",
        op="moe",
        build=build,
        baseline="memory",
        bars=DECODE_BARS,
        work=Work(bytes=num_bytes),
        units=dict.fromkeys(("memory", "eager", "compile"), steps),
        unit="step",
        first_calls=("compile",),
        memory=4.0 * 2 * num_experts * DIM * HIDDEN + num_bytes,
    )


def _experts_read(batch: int, num_experts: int) -> int:
    gate = _gate(load_head, num_experts)
    with torch.no_grad():
        return sum(gate(x).indices.unique().numel() for x in _batches(batch))


def _batches(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, DIM, generator=generator) for _ in range(DECODE_STEPS[batch])]


def _layer(load: Load, num_experts: int, *, gated: bool) -> tuple[Tensor, Any]:
    gate = _gate(load, num_experts)
    experts = load("core_gates.moe.experts").StackedExperts(num_experts, DIM, HIDDEN, gated=gated)
    layer = load("core_gates.moe.layer").MoELayer(gate, experts, return_routing=False)
    return torch.randn(TOKENS, DIM), layer


def _gate(load: Load, num_experts: int) -> Any:
    torch.manual_seed(0)
    return load("core_gates.gates.top_k").TopKGate(DIM, num_experts, k=K)


def _call(model: nn.Module, x: Tensor, backward: bool) -> Call:
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return model(x)

        return forward
    inputs = [x.clone().requires_grad_(), *model.parameters()]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(model(inputs[0]), inputs, grad)
