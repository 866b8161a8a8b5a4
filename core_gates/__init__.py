"""The gating core: gates, fused ops, losses, schedules and monitors in pure PyTorch."""
