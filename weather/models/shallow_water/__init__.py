"""Stirred shallow water on the sphere."""
