"""Mixture models of transformers whose experts stay on disk until a token needs them."""
