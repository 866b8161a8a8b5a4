"""Verbs that make stores of stores: regrid, forecast, cycle."""
