"""``gates weather``: assimilate observations into weather fields."""
