"""Multiplication with a sigmoid gate: ``x * sigmoid(logits)``."""
