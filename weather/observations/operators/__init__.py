"""Observation operators that interpolate."""
