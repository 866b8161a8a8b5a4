"""A small decoder whose experts are spawned from one: EvoMoE and its rivals."""
