"""Readers of observation files, one format a file."""
