"""What gated adapters cost in a transformer of FLUX.1, and what libraries of adapters cost."""
