"""Low-rank adapters whose ranks or outputs are gated."""
