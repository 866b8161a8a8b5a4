"""Studies that can prove or refute what gates are said to do."""

from studies.generalization import Budget, generalization_study, generalization_table
from studies.planted_features import (
    PlantedTask,
    planted_data,
    planted_features_headline,
    planted_features_study,
    planted_features_table,
)

__all__ = [
    "Budget",
    "PlantedTask",
    "generalization_study",
    "generalization_table",
    "planted_data",
    "planted_features_headline",
    "planted_features_study",
    "planted_features_table",
]
