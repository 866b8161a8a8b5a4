"""Weights of tasks: uncertainty, GradNorm, DWA; PCGrad."""
