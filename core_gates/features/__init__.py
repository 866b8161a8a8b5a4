"""Gates on features: they scale their input and route nothing."""
