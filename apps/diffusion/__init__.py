"""``gates diffusion``: adapters found by their weights and fused by gates."""
