"""What a script needs first, each with its file."""

from .baselines import LETKF as LETKF
from .baselines import OptimalInterpolation as OptimalInterpolation
from .cycle import Cycle as Cycle
from .models.adas.analysis import AdasAnalysis as AdasAnalysis
from .models.adas.analysis import read_analysis as read_analysis
from .models.adas.network import Adas as Adas
from .models.shallow_water.model import ShallowWater as ShallowWater
from .observations.gridded import GriddedObservations as GriddedObservations
from .operations.long_cycle import run_cycle as run_cycle

__version__: str
