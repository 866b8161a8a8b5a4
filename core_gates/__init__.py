"""The gating core: gates, fused ops, losses, schedules and monitors in pure PyTorch.

Names are imported when they are first used, so that ``import core_gates`` itself costs nothing:
``from core_gates import TopKGate`` imports PyTorch, and nothing here imports more than that.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core_gates.attention.cross import GatedCrossAttention
    from core_gates.conv import GatedConv, PartialConv
    from core_gates.errors import GatesError, MissingExtraError
    from core_gates.gates.base import Gate
    from core_gates.gates.collect import collect_routing, routing_gates, update_gates
    from core_gates.gates.routing import RoutingOutput
    from core_gates.gates.softmax import SoftmaxGate
    from core_gates.gates.top_k import TopKGate
    from core_gates.losses import (
        balance_loss,
        entropy_loss,
        importance_loss,
        l0_loss,
        z_loss,
    )
    from core_gates.monitor import GateMonitor
    from core_gates.ops import kernels
    from core_gates.ops.gate_multiply.op import gate_multiply
    from core_gates.ops.silu_gate.op import silu_gate
    from core_gates.schedules import PiecewiseSchedule, TemperatureSchedule

_HOMES = {
    "GateMonitor": "monitor",
    "Gate": "gates.base",
    "GatedConv": "conv",
    "GatedCrossAttention": "attention.cross",
    "GatesError": "errors",
    "MissingExtraError": "errors",
    "PartialConv": "conv",
    "PiecewiseSchedule": "schedules",
    "RoutingOutput": "gates.routing",
    "SoftmaxGate": "gates.softmax",
    "TemperatureSchedule": "schedules",
    "TopKGate": "gates.top_k",
    "balance_loss": "losses",
    "collect_routing": "gates.collect",
    "entropy_loss": "losses",
    "gate_multiply": "ops.gate_multiply.op",
    "importance_loss": "losses",
    "kernels": "ops",
    "l0_loss": "losses",
    "routing_gates": "gates.collect",
    "silu_gate": "ops.silu_gate.op",
    "update_gates": "gates.collect",
    "z_loss": "losses",
}

__all__ = [
    "Gate",
    "GateMonitor",
    "GatedConv",
    "GatedCrossAttention",
    "GatesError",
    "MissingExtraError",
    "PartialConv",
    "PiecewiseSchedule",
    "RoutingOutput",
    "SoftmaxGate",
    "TemperatureSchedule",
    "TopKGate",
    "balance_loss",
    "collect_routing",
    "entropy_loss",
    "gate_multiply",
    "importance_loss",
    "kernels",
    "l0_loss",
    "routing_gates",
    "silu_gate",
    "update_gates",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
