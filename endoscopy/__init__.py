"""Polyp sizing from colonoscopy frames with feature-selection gates and gradient routing."""
