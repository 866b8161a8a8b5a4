"""Frame tables, their readers, splits, samplers, transforms, and what a network is fed."""
