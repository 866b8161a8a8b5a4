"""Metrics of ranking, calibration and off-policy evaluation, on arrays."""
