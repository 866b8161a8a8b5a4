"""Multi-task ranking: schema, embeddings, models from SingleTask to HoME, metrics, diagnosis.

Names are imported when they are first used, as ``from recsys import HoME``.
"""

from core_gates import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
