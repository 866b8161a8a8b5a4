"""What the gates of a model do, counted while it runs."""

from core_gates.monitor.hooks import GateMonitor, GateReport

__all__ = ["GateMonitor", "GateReport"]
