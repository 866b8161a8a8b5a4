"""Folds and splits that refuse leakage."""
