"""Experiments of an application: scores and what is computed for them."""
