"""The frame table, and the sizes and boxes in it."""
