"""Experiments on sizing networks as plain objects: which networks, on which data, scored how."""
