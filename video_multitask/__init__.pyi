"""What a script needs first, each with its file."""

from .kuairand.folder import KuaiRand as KuaiRand
from .scorer import FusedScore as FusedScore
from .sources.explicit import ExplicitLog as ExplicitLog
from .sources.kuairand import KuaiRandTables as KuaiRandTables
from .sources.simulated import SimulatedFeed as SimulatedFeed

__version__: str
