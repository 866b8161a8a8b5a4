"""Routing gates, one a file: a routing input becomes mixture weights over experts."""

from core_gates.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
