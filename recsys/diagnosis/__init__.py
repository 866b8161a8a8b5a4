"""The three faults of mixtures of experts, as numbers and figures."""

from recsys.diagnosis.diagnose import Rows, diagnose, network_of
from recsys.diagnosis.expert_report import ExpertReport, LayerReport

__all__ = ["ExpertReport", "LayerReport", "Rows", "diagnose", "network_of"]
