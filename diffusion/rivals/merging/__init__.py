"""Adapters merged into one by their weights alone."""

from diffusion.rivals.merging.methods import METHODS, merge

__all__ = ["METHODS", "merge"]
