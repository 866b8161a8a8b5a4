"""Studies that can prove or refute what gates are said to do.

Names are imported when they are first used: a study waits for none of the libraries of another.
"""

from core_gates import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
