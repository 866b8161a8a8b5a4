"""Which rows of stacked parameters tasks share.

E experts or other stacked parts, S gates.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from core_gates.gates.mixture import MaskedMixture
from recsys.models.gating import GateNetworks

Parts = list[tuple[nn.Parameter, slice]]
"""Parameters, each with rows of its first dimension; one may occur several times."""


def whole(*modules: nn.Module | None) -> Parts:
    """Return every parameter of some modules, all rows of it."""
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    return [(parameter, slice(None)) for parameter in parameters if parameter.numel()]


def rows_where(parameters: Iterable[nn.Parameter], shared: Sequence[bool]) -> Parts:
    """Return the shared rows of parameters that are stacked along their first dimension.

    Args:
        parameters: Parameters (E, ...).
        shared: Whether each of the E is shared.
    """
    stretches: list[slice] = []
    for row in (row for row, chosen in enumerate(shared) if chosen):
        if stretches and stretches[-1].stop == row:
            stretches[-1] = slice(stretches[-1].start, row + 1)
        else:
            stretches.append(slice(row, row + 1))
    return [(parameter, rows) for parameter in parameters for rows in stretches]


def gates_where(mixture: MaskedMixture, shared: Sequence[bool]) -> Parts:
    """Return the rows of shared gates and of their self gates; not free weights.

    Args:
        mixture: S gates.
        shared: Whether each of the S is shared.
    """
    rows = [shared[gate] for gate in mixture.gate_of_row]
    packed = [p for p in (mixture.weight, mixture.bias) if p is not None]
    if not isinstance(mixture, GateNetworks):
        return rows_where(packed, rows)
    packed += [] if mixture.norm is None else mixture.norm.parameters()
    hidden = [] if mixture.hidden is None else mixture.hidden.parameters()
    return rows_where(packed, rows) + rows_where(hidden, shared)
