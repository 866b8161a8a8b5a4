"""What ``generate``, ``demo`` and the tour share: a base, a library of adapters, and gates."""
