"""Values that reference implementations computed, in float64."""
