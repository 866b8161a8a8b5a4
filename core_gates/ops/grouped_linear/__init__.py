"""Linear map with one weight per group of rows: the two matmuls of stacked experts."""
