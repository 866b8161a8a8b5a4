"""Gated residual branch and the LayerNorm that follows it, in one pass."""
