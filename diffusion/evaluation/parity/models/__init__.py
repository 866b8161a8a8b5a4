"""Adapters on models: as other libraries compute them, and gone without a trace."""
