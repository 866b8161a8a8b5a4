"""Names of the room, each with its file."""

from .generalization import Budget as Budget
from .generalization import generalization_study as generalization_study
from .generalization import generalization_table as generalization_table
from .planted_features import PlantedTask as PlantedTask
from .planted_features import planted_data as planted_data
from .planted_features import planted_features_headline as planted_features_headline
from .planted_features import planted_features_study as planted_features_study
from .planted_features import planted_features_table as planted_features_table

__version__: str
