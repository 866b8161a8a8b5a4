"""Polyp sizing from colonoscopy frames with feature-selection gates and gradient routing.

Names are imported when they are first used, as ``from endoscopy import MultiStreamSizer``.
"""

from core_gates import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
