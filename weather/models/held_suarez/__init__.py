"""Dry primitive equations with Held-Suarez forcing."""
