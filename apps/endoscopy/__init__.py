"""``gates endoscopy``: polyp sizing with feature-selection gates and gradient routing."""
