"""Verbs on files of adapters; they import no library of models."""
