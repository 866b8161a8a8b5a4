"""Comparisons of networks: which take part, how each is built, what their predictions score."""
