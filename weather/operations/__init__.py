"""What runs over whole stores: regridding, forecasts, cycles."""
