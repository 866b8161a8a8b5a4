"""Diffusion: find low-rank adapters by their weights and fuse them by a learned gate (AutoLoRA)."""
