"""Two overlaid digits at once: eight experts and a gate for each digit."""
