"""Logs larger than memory: Parquet shards, and batches from them that resume exactly."""
