"""Folders of adapters: indexed, and searched by weights, by metadata and by likeness."""

from diffusion.library.adapter import Adapter
from diffusion.library.encoders import TextEncoder, WeightEncoder
from diffusion.library.errors import LibraryError
from diffusion.library.index import INDEX, LoraLibrary
from diffusion.library.paths import Refused
from diffusion.library.result import Match, Neighbor, Results
from diffusion.library.scan import ScanReport

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
