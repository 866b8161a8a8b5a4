"""What a model costs before it is built: weights, arithmetic, memory, exchange, price."""
