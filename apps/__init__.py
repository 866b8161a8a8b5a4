"""Commands, configurations and reports; no tensor mathematics."""
