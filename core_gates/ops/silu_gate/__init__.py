"""Epilogue of the gated convolution: ``silu(a) * sigmoid(g)`` and ``sigmoid(g)`` in one pass."""
