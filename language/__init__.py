"""Language: experts and gates of language models, exchanged with transformers.

Names are imported when they are first used, as ``from language import Decoder``.
"""

from core_gates import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
