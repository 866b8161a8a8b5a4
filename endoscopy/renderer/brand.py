"""Endoscopes: how their images of the same scene differ."""

from typing import NamedTuple


class Brand(NamedTuple):
    """An endoscope.

    Attributes:
        name: Its name, ``endoscope_brand`` on disk.
        field_of_view: Full angle of the equidistant fisheye in degrees.
        gain: Factor on the radiance.
        color: Factors on red, green and blue.
    """

    name: str
    field_of_view: float
    gain: float
    color: tuple[float, float, float]


BRANDS = {
    "A": Brand("A", 140.0, 1.0, (1.0, 1.0, 1.0)),
    "B": Brand("B", 165.0, 0.7, (0.95, 1.0, 1.12)),
}
