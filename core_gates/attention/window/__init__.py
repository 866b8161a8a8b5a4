"""Attention within shifted windows of a grid, and the transformer block made of it."""
