"""Sparse modular activation: attention that runs on the tokens which ask for it (SeqBoat)."""
