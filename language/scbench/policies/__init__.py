"""What a cache of keys and values keeps, in how many bits, and what is read of it."""
