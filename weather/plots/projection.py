"""The Equal Earth projection (Šavrič, Patterson and Jenny 2018): pleasant, and true in area."""

import numpy as np

A1, A2, A3, A4 = 1.340264, -0.081106, 0.000893, 0.003796


def equal_earth(latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project degrees to (x, y) in Earth radii.

    Args:
        latitude: Degrees.
        longitude: Degrees east of the central meridian; beyond ±180 lies outside the outline.
    """
    theta = np.arcsin(np.sqrt(3) / 2 * np.sin(np.deg2rad(latitude)))
    square = theta**2
    slope = A1 + square * (3 * A2 + square**2 * (7 * A3 + square * 9 * A4))
    x = 2 / np.sqrt(3) * np.deg2rad(longitude) * np.cos(theta) / slope
    y = theta * (A1 + square * (A2 + square**2 * (A3 + square * A4)))
    return x, y


def outline() -> np.ndarray:
    """Return the border of the world map, a closed polygon (points, 2)."""
    north = np.linspace(-90, 90, 91)
    latitude = np.concatenate((north, north[::-1]))
    longitude = np.concatenate((np.full(91, 180.0), np.full(91, -180.0)))
    return np.column_stack(equal_earth(latitude, longitude))
