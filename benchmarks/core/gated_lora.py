"""A gated linear layer against the plain layer, the published gate and PEFT."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.comparison import Call, Comparison, Load, Work
from core_gates.adapters import LowRank

ABSENT = "peft is not installed: pip install peft"


def comparisons() -> Iterator[Comparison]:
    """Three and eight adapters, forward, then forward with backward; on one CPU thread."""
    for backward in (False, True):
        for num_adapters in (3, 8):
            yield gated_lora(num_adapters, backward=backward)


def is_installed() -> bool:
    """Return whether the peer can be imported."""
    return importlib.util.find_spec("peft") is not None


@torch.no_grad()
def active_adapters(linear: nn.Linear, adapters: Sequence[LowRank]) -> nn.Module:
    """Wrap a copy of a layer so that all adapters are active at once.

    Args:
        linear: The layer; it is copied.
        adapters: Adapters of this layer.

    Returns:
        A module from (..., D) to (..., D').
    """
    peft: Any = importlib.import_module("peft")
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    copy.load_state_dict(linear.state_dict())
    configs = {
        f"adapter{k}": peft.LoraConfig(r=a.rank, lora_alpha=a.rank * a.scale, target_modules=["0"])
        for k, a in enumerate(adapters)
    }
    first = next(iter(configs))
    model = peft.get_peft_model(nn.Sequential(copy), configs[first], adapter_name=first)
    for name, config in configs.items():
        if name != first:
            model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name, adapter in zip(configs, adapters, strict=True):
        layer.lora_A[name].weight.copy_(adapter.down)
        layer.lora_B[name].weight.copy_(adapter.up)
    model.base_model.set_adapter(list(configs))
    return cast(nn.Module, layer)


TOKENS, DIM, RANK = 1024, 3072, 16
BARS = {
    3: {"reference": 1.25, "cpp": 1.15},
    8: {"reference": 1.45, "cpp": 1.30},
}
"""Of the definition, and of the fastest mode."""


def gated_lora(num_adapters: int, *, backward: bool = False) -> Comparison:
    """Compare the layer with ``num_adapters`` adapters with the layer alone.

    With ``backward``, the gate and the input have gradients, while layer and adapters are frozen;
    then there are no bars.
    """
    flops = 2.0 * TOKENS * DIM * (DIM + 2 * num_adapters * RANK)
    passes = "forward+backward" if backward else "forward"

    def build(load: Load) -> Mapping[str, Call]:
        return _variants(load, num_adapters, backward)

    return Comparison(
        name=f"gated LoRA {passes} {TOKENS}x{DIM}, rank {RANK}, K={num_adapters}",
        op="gated_lora",
        build=build,
        baseline="linear",
        bars={} if backward else BARS.get(num_adapters, {}),
        work=None if backward else Work(flops=flops),
        first_calls=("compile",) if backward else ("compile", "cpp"),
        absent={} if is_installed() else {"peft": ABSENT},
        memory=4.0 * TOKENS * DIM * (10 * num_adapters + 10),
    )


def _variants(load: Load, num_adapters: int, backward: bool) -> Mapping[str, Call]:
    torch.manual_seed(0)
    kernels = load("core_gates.ops").kernels
    adapters = [
        load("core_gates.adapters.low_rank").LowRank(
            torch.randn(RANK, DIM) / DIM**0.5, torch.randn(DIM, RANK) / RANK**0.5, 0.5
        )
        for _ in range(num_adapters)
    ]
    linear = nn.Linear(DIM, DIM).requires_grad_(False)
    module = load("core_gates.adapters.gated_lora").GatedLoraLinear(linear, adapters)
    for parameter in module.gate.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(TOKENS, DIM, requires_grad=backward)

    def published(x: Tensor) -> Tensor:
        return module.gate(linear(x), module.adapter_outputs(x))

    layers: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "linear": (linear, "reference"),
        "reference": (module, "reference"),
        "compile": (module, "compile"),
        "cpp": (module, "cpp"),
        "published gate": (published, "reference"),
    }
    if is_installed():
        frozen = active_adapters(linear, adapters).requires_grad_(False)
        layers["peft, without gate"] = (frozen, "reference")
    parameters = list(module.gate.parameters())

    def variant(layer: Callable[[Tensor], Tensor], mode: str) -> Call:
        def call() -> object:
            with kernels(mode), torch.set_grad_enabled(backward):
                out = layer(x)
                if not backward:
                    return out
                return torch.autograd.grad(out.sum(), (x, *parameters), allow_unused=True)

        return call

    return {name: variant(layer, mode) for name, (layer, mode) in layers.items()}
