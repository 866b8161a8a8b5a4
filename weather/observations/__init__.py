"""Observations: reports, simulated networks, and their gridded form with error and confidence."""
