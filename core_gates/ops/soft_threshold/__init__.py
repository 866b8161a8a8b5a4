"""Soft threshold, the proximal map of the L1 norm: ``sign(x) max(|x| - threshold, 0)``."""
