"""Training with gates: gradient routing, proximal steps, batch norm across ranks."""
