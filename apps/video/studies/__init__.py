"""Studies that `evaluate` makes: a stream of rows larger than memory, and a model trained daily."""
