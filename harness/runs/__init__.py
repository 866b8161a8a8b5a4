"""Run folders, checkpoints, exact loops, logs, processes and progress."""
