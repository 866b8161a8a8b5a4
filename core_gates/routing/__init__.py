"""What all routing gates share: outputs, counts, capacity, losses and schedules."""

from core_gates.routing.capacity import positions_in_expert
from core_gates.routing.output import RoutingOutput

__all__ = ["RoutingOutput", "positions_in_expert"]
