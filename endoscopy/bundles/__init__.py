"""Trained networks as folders: weights, target, scope, intervals, abstention."""
