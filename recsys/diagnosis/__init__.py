"""The three faults of mixtures of experts, as numbers and figures."""

from recsys.diagnosis.diagnose import (
    ExpertReportCallback,
    Rows,
    diagnose,
    permutation_importance,
)
from recsys.diagnosis.expert_report import ExpertReport, LayerReport

__all__ = [
    "ExpertReport",
    "ExpertReportCallback",
    "LayerReport",
    "Rows",
    "diagnose",
    "permutation_importance",
]
