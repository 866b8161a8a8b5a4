"""Gated convolutions."""
