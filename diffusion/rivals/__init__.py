"""Other ways to use several adapters at once, which gates are compared with."""

from diffusion.rivals.registry import RIVALS, Rival, make_rival

__all__ = ["RIVALS", "Rival", "make_rival"]
