"""Analyses that minimise a cost: 3D-Var and strong-constraint 4D-Var."""
