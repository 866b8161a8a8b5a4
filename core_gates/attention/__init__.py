"""Attention with gates around it: over windows of a grid, blocks of a text, or active tokens."""
