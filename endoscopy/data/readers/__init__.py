"""Readers of raw data sets, which report every fault."""
