"""What a script needs first, each with its file."""

from .data.datamodule import TableDataModule as TableDataModule
from .data.readers.own_table import OwnTable as OwnTable
from .models.home import HoME as HoME
from .models.mmoe import MMoE as MMoE
from .models.mmoe import SharedBottom as SharedBottom
from .models.ple import PLE as PLE
from .ranker_module import MultiTaskModule as MultiTaskModule
from .schema import FeatureSchema as FeatureSchema
from .schema import Task as Task
from .table_scorer import TableScorer as TableScorer

__version__: str
