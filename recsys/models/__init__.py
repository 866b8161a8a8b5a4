"""Multi-task networks from inputs (B, D) to logits (B, T)."""
