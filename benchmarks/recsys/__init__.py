"""Ranking models next to those of other libraries."""
