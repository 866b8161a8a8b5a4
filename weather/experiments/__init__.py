"""Experiments in which the truth is known: twin worlds and the ERA5 ensemble."""
