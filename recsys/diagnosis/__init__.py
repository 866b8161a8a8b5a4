"""The three faults of mixtures of experts, as numbers and figures."""
