"""Figures: the style of all plots and those that domains share."""
