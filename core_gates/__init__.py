"""The gating core: gates, fused ops, losses, schedules and monitors in pure PyTorch.

On top are all routing gates and what users of many rooms need; everything else is imported from its
room, such as ``core_gates.ops``. Names are imported when they are first used, so that
``import core_gates`` costs nothing and ``from core_gates import TopKGate`` little more than
PyTorch.
"""

from core_gates.extras import watch_imports
from core_gates.lazy import exports

watch_imports()
__getattr__, __dir__, __all__ = exports(__name__, __file__)
