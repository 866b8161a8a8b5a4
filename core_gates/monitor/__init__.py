"""What the gates of a model do, counted while it runs."""

from core_gates.monitor.hooks import GateMonitor
from core_gates.monitor.report import GateReport

__all__ = ["GateMonitor", "GateReport"]
