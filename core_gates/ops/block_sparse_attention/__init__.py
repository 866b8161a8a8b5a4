"""Attention restricted to the kept blocks of a boolean block mask."""
