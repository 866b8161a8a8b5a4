"""Both linear maps of stacked experts as one op, group by group."""
