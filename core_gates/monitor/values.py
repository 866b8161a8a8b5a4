"""What is measured of a gate that is not a routing gate: values between 0 and 1.

Each observation becomes a flat vector of sums without being read on the host. A value that is not
finite is counted, not added, and reaches the host with the other sums.
"""

from dataclasses import dataclass

from torch import Tensor

from core_gates.monitor.sums import counts, exact, join, split


@dataclass(frozen=True)
class ValueStatistics:
    """Mean, spread and saturation of gate values between 0 and 1.

    Args:
        bins: Bins of the histogram over [0, 1]; values beyond count in the first or last bin.
    """

    bins: int = 20

    @property
    def sizes(self) -> dict[str, int]:
        """Name and length of each part of the flat vector."""
        scalars = ("values", "non_finite", "sum", "squares", "zero", "closed", "open")
        return dict.fromkeys(scalars, 1) | {"histogram": self.bins}

    def sums(self, values: Tensor) -> Tensor:
        """Return the flat sums of gate values of any shape."""
        values = exact(values.detach().flatten())
        finite = values.isfinite()
        values = values.masked_fill(~finite, 0)
        parts = {
            "values": finite.sum(),
            "non_finite": (~finite).sum(),
            "sum": values.sum(),
            "squares": values.square().sum(),
            "zero": (finite & (values == 0)).sum(),
            "closed": (finite & (values < 0.1)).sum(),
            "open": (finite & (values > 0.9)).sum(),
            "histogram": counts((values * self.bins).long(), finite, self.bins),
        }
        return join(parts, self.sizes)

    def figures(self, total: Tensor) -> dict[str, float]:
        """Return the figures of a total; without any value only the two counts.

        ``values`` measured; ``non_finite`` ones; ``mean`` and population ``std``; ``zero``, the
        fraction that is exactly 0; ``closed`` and ``open``, the fractions below 0.1 and above 0.9.
        """
        parts = {k: float(v.sum()) for k, v in split(total, self.sizes).items()}
        figures = {"values": parts["values"], "non_finite": parts["non_finite"]}
        if parts["values"] == 0:
            return figures
        for name in ("zero", "closed", "open"):
            figures[name] = parts[name] / parts["values"]
        figures["mean"] = parts["sum"] / parts["values"]
        variance = parts["squares"] / parts["values"] - figures["mean"] ** 2
        figures["std"] = max(variance, 0.0) ** 0.5
        return figures

    def distributions(self, total: Tensor) -> dict[str, Tensor]:
        """Return the ``histogram`` of a total, as counts."""
        return {"histogram": split(total, self.sizes)["histogram"]}
