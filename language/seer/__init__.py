"""Gates that choose the blocks which attention of transformers models reads (SeerAttention)."""
