"""Short-video ranking: KuaiRand, behaviours, a feed simulator, streaming, scoring.

Names are imported when they are first used, as ``from video_multitask import KuaiRand``.
"""

from core_gates.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
