"""Checks that only a simulated feed allows: its rates, and policies whose true value is known."""
