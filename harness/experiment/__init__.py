"""Experiments: pieces of work, their results, tuning, scores; see ``harness.experiment.run``.

Names are imported when they are first used: who only reads records never waits for Lightning.
"""

from core_gates.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
