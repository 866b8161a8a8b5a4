"""Weights of tasks: uncertainty, GradNorm, DWA; PCGrad."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from core_gates.errors import GatesError
from recsys.balancing.balancer import Balancer, Shared
from recsys.balancing.dwa import DynamicWeightAverage
from recsys.balancing.fixed import Fixed
from recsys.balancing.grad_norm import GradNorm
from recsys.balancing.pcgrad import PCGrad
from recsys.balancing.uncertainty import Uncertainty

__all__ = ["BALANCERS", "Balancer", "Shared", "balancer", "check_balancing"]

BALANCERS: dict[str, type[Balancer]] = {
    "fixed": Fixed,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "dwa": DynamicWeightAverage,
    "pcgrad": PCGrad,
}
"""Name of every way to balance tasks -> its class."""


def check_balancing(name: str, options: Iterable[str]) -> None:
    """Refuse an unknown way to balance tasks, or an option that it does not have.

    Raises:
        GatesError: There is none of that name, or it has no such option.
    """
    if name not in BALANCERS:
        close = difflib.get_close_matches(name.lower(), BALANCERS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise GatesError(f"balancing is {name!r}{hint}; choose one of {', '.join(BALANCERS)}")
    known = [
        p
        for p in inspect.signature(BALANCERS[name].__init__).parameters
        if p not in ("self", "num_tasks")
    ]
    if strangers := [option for option in options if option not in known]:
        has = f"only {', '.join(known)}" if known else "none"
        raise GatesError(f"balancing {name} has no option {strangers[0]!r}; it has {has}")


def balancer(name: str, options: Mapping[str, Any], num_tasks: int) -> Balancer:
    """Return a balancer.

    Args:
        name: One of :data:`BALANCERS`.
        options: Its options by name.
        num_tasks: Number of tasks T.

    Raises:
        GatesError: There is none of that name, or it has no such option or refuses a value.
    """
    check_balancing(name, options)
    try:
        return BALANCERS[name](num_tasks, **options)
    except (TypeError, ValueError) as error:
        raise GatesError(f"balancing {name}: {error}") from error
