"""Colors of the classes of sizes, and axes in millimeters."""

from matplotlib.axes import Axes

from harness.figures.style import AMBER, BLUE, ORANGE

CLASS_COLORS = (BLUE, AMBER, ORANGE)  # diminutive, small, large


def size_axis(axes: Axes, which: str = "both") -> None:
    """Make axes logarithmic in millimeters, ticks at clinical sizes."""
    ticks = [1, 2, 3, 5, 10, 20, 30]
    for name in ("x", "y") if which == "both" else (which,):
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
