"""Diffusion: find low-rank adapters by their weights and fuse them by a learned gate (AutoLoRA).

Names are imported when they are first used, as ``from diffusion import GatedFusion``.
"""

from core_gates import lazy

__getattr__, __dir__, __all__ = lazy.exports(__name__, __file__)
