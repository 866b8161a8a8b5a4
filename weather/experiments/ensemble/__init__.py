"""The ERA5 ensemble sample as an experiment."""
