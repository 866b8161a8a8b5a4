"""``gates diffusion``: adapters of image models, found by a prompt and fused by a gate."""
