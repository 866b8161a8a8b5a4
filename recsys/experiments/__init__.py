"""Comparisons of networks: which take part, how each is built, what their predictions score.

Names are imported when they are first used.
"""

from core_gates.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
