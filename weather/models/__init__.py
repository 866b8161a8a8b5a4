"""Networks and dynamical models of weather."""
