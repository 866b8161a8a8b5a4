"""The user's own reanalysis as an experiment."""
