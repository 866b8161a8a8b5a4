"""Routing gates, one a file: a routing input becomes mixture weights over experts."""

from core_gates.gates.predictive import fetch_order, prediction_recall

__all__ = ["fetch_order", "prediction_recall"]
