"""Gated mixing of low-rank adapters into the output of a layer, without their full-size outputs."""
