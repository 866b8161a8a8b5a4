"""``gates study``: how to train with gates, each claim with its figures and a verdict."""
