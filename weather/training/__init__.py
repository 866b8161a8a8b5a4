"""Training of assimilation networks: batches, streams of problems, losses, the module."""
