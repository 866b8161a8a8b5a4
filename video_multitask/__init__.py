"""Short-video ranking: KuaiRand, behaviours, a feed simulator, streaming, scoring.

Names are imported when they are first used, as ``from video_multitask import KuaiRand``.
"""

from core_gates import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
