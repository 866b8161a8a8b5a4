"""The smooth step: a cubic from exactly 0 to exactly 1 within a band of width gamma."""
