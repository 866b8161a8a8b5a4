"""Causal attention that also returns the largest weight in every block."""
