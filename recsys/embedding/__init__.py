"""Embedding tables: plain, hashed, factored; their optimizer, int8 rows, shards over ranks."""
