"""FengWu-Adas: gated assimilation of observations into a background."""
