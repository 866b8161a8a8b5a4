"""Attention with gates around it, over shifted windows of a gridded state."""
