"""Diffusion transformers: the embedded tiny base, its text encoder, and real models from files."""
