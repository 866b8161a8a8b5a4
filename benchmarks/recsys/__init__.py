"""Ranking: networks, their inputs and their serving."""
