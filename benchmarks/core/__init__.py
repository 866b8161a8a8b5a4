"""Comparisons of the core beyond its element-wise ops."""
