"""Training of forecast models: one step, then from their own forecasts."""
