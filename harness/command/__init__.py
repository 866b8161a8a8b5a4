"""The command line of an application.

Names are imported when they are first used: verbs that are functions never wait for Lightning.
"""

from core_gates.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
