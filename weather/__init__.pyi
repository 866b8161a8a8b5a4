"""What a script needs first, each with its file."""

from .baselines import LETKF as LETKF
from .baselines import OptimalInterpolation as OptimalInterpolation
from .cycle import Cycle as Cycle
from .models.adas.analysis import AdasAnalysis as AdasAnalysis
from .models.adas.analysis import read_analysis as read_analysis
from .models.adas.network import Adas as AdasNetwork
from .observations.gridded import GriddedObservations as GriddedObservations
from .operations.long_cycle import run_cycle as run_cycle

__all__ = ["AdasNetwork"]  # whose class keeps its shorter name, which results record
__version__: str
