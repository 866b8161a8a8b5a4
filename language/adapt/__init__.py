"""Adapters of models of transformers, trained on labeled texts."""
