"""Weather: gated data assimilation cycling with a forecast model (FengWu-Adas).

Names are imported when they are first used, as ``from weather import LETKF``.
"""

from core_gates import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
