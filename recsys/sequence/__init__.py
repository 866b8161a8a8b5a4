"""Encoders of histories: mean, target attention, short transformer."""
