"""The index on the disk: rows in SQLite, embeddings in a file next to it."""
