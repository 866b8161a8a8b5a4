"""What can be tuned and compared: a name, a box of settings, and how to build from a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from core_gates.errors import GatesError
from weather.baselines.assimilator import Assimilator

Box = Mapping[str, tuple[float, float]]
Setting = dict[str, float]

OPTIMIZER_BOX: Box = {"learning_rate": (5e-4, 1e-2), "weight_decay": (1e-3, 1e-1)}
"""Box of the optimizer of every network."""


class Method(NamedTuple):
    """A method of an experiment.

    Attributes:
        name: Its name in tables and settings.
        build: Returns the assimilator for a setting.
        box: Bounds of the settings; empty where there is nothing to tune.
        members: Ensemble size.
    """

    name: str
    build: Callable[[Setting], Assimilator]
    box: Box = MappingProxyType({})
    members: int = 1


Settings = Mapping[str, Mapping[str, float]]
"""Tuned settings: ``"<method>@<task>"`` to the values of the method's box."""


def choice_name(method: str, task: str) -> str:
    """Return the name of what is tuned: a method for a task."""
    return f"{method}@{task}"


def is_stored(settings: Settings, method: Method, task: str) -> bool:
    """Return whether every value of the method's box is stored for a task."""
    return set(settings.get(choice_name(method.name, task), {})) == set(method.box)


def stored(settings: Settings, method: Method, task: str) -> Setting:
    """Return the setting of a method for a task, the middle of its box where none is stored."""
    if is_stored(settings, method, task):
        return dict(settings.get(choice_name(method.name, task), {}))
    return {name: (low * high) ** 0.5 for name, (low, high) in method.box.items()}


def built(settings: Settings, method: Method, task: str) -> Assimilator:
    """Return a method with its stored setting, or with the middle of its box.

    Raises:
        GatesError: It refuses the setting.
    """
    try:
        return method.build(stored(settings, method, task))
    except ValueError as error:
        raise GatesError(
            f"the setting of {choice_name(method.name, task)} cannot be used ({error}): run "
            "`gates weather tune --overwrite`"
        ) from error
