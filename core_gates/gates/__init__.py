"""Routing gates, one a file: a routing input becomes mixture weights over experts."""
