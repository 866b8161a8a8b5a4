"""Folders of adapters: indexed, and searched by weights, by metadata and by likeness."""

from diffusion.library.index import INDEX, LoraLibrary, ScanReport
from diffusion.library.paths import LibraryError, Refused
from diffusion.library.record import Adapter, Match, Neighbor, Results, TextEncoder, WeightEncoder

__all__ = [
    "INDEX",
    "Adapter",
    "LibraryError",
    "LoraLibrary",
    "Match",
    "Neighbor",
    "Refused",
    "Results",
    "ScanReport",
    "TextEncoder",
    "WeightEncoder",
]
