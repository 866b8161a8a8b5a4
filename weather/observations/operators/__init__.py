"""Observation operators that interpolate, and stations off the grid."""
