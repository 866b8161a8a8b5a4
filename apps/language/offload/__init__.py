"""``gates language offload``: mixture models whose experts stay on disk."""
