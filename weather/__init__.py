"""Weather: gated data assimilation cycling with a forecast model (FengWu-Adas)."""
