"""Output gates on the attention of transformers models, and files of them."""
