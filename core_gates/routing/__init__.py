"""What all routing gates share: outputs, counts, capacity, losses and schedules."""

from core_gates.routing.assignment import PermutationSearch
from core_gates.routing.base import Gate
from core_gates.routing.capacity import (
    LimitedGate,
    capacity,
    count_routed,
    limit_capacity,
    positions_in_expert,
    read_counts,
)
from core_gates.routing.collect import (
    collect_routing,
    refuse_coupled_gates,
    routing_gates,
    update_gates,
)
from core_gates.routing.losses import (
    balance_loss,
    entropy_loss,
    importance_loss,
    information_loss,
    l0_loss,
    orthogonality_loss,
    z_loss,
)
from core_gates.routing.output import RoutingOutput
from core_gates.routing.schedules import (
    PiecewiseSchedule,
    SparsitySchedule,
    StagedGate,
    StagedSchedule,
    SteppedGate,
    TemperatureSchedule,
)

__all__ = [
    "Gate",
    "LimitedGate",
    "PermutationSearch",
    "PiecewiseSchedule",
    "RoutingOutput",
    "SparsitySchedule",
    "StagedGate",
    "StagedSchedule",
    "SteppedGate",
    "TemperatureSchedule",
    "balance_loss",
    "capacity",
    "collect_routing",
    "count_routed",
    "entropy_loss",
    "importance_loss",
    "information_loss",
    "l0_loss",
    "limit_capacity",
    "orthogonality_loss",
    "positions_in_expert",
    "read_counts",
    "refuse_coupled_gates",
    "routing_gates",
    "update_gates",
    "z_loss",
]
