"""Linear map with one weight per group of rows: the two matrix products of stacked experts."""
