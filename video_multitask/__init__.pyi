"""What a script needs first, each with its file."""

from .kuairand.folder import KuaiRand as KuaiRand
from .scorer import FusedScore as FusedScore

__version__: str
