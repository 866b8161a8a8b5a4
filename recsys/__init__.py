"""Multi-task ranking: schema, embeddings, models from SingleTask to HoME, metrics, diagnosis."""
