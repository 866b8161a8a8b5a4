"""Multi-task networks from inputs (B, D) to logits (B, T)."""

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from core_gates.errors import GatesError
from recsys.models.net import ExpertLayer, MultiTaskNet
from recsys.schema import Task

__all__ = [
    "MODELS",
    "ExpertLayer",
    "MultiTaskNet",
    "build",
    "check_options",
    "network",
    "options_of",
]

_HOMES = {
    "SingleTask": "mmoe",
    "SharedBottom": "mmoe",
    "OMoE": "mmoe",
    "MMoE": "mmoe",
    "CGC": "ple",
    "PLE": "ple",
    "AdaTT": "adatt",
    "ESMM": "funnels",
    "AITM": "funnels",
    "STEM": "prior_gates",
    "PEPNet": "prior_gates",
    "HoME": "home",
}
_FIXED = ("self", "input_dim", "tasks", "device", "dtype")


class _Models(Mapping[str, type[MultiTaskNet]]):
    """Name -> network, imported when it is first used."""

    def __getitem__(self, name: str) -> type[MultiTaskNet]:
        module = importlib.import_module(f"recsys.models.{_HOMES[name]}")
        return cast(type[MultiTaskNet], getattr(module, name))

    def __contains__(self, name: object) -> bool:
        return name in _HOMES

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


MODELS: Mapping[str, type[MultiTaskNet]] = _Models()
"""Name of every network -> its class."""


def network(name: str) -> type[MultiTaskNet]:
    """Return the class of a network.

    Args:
        name: One of :data:`MODELS`, or the place of another class: ``package.module.Name``.

    Raises:
        GatesError: There is no network of that name, or the class is no :class:`MultiTaskNet`.
    """
    if name in MODELS:
        return MODELS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise GatesError(f"there is no network {name!r}{_similar(name, MODELS)}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise GatesError(f"the network {name} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, MultiTaskNet)):
        raise GatesError(f"{name} is no network: derive it from recsys.models.MultiTaskNet")
    return found


def options_of(name: str) -> list[str]:
    """Return the names of the options of a network.

    Raises:
        GatesError: There is no network of that name.
    """
    parameters = inspect.signature(network(name).__init__).parameters
    return [option for option in parameters if option not in _FIXED]


def check_options(name: str, options: Iterable[str]) -> None:
    """Refuse an unknown network, or an option that it does not have.

    Raises:
        GatesError: There is no network of that name, or it has no such option.
    """
    known = options_of(name)
    for option in options:
        if option not in known:
            raise GatesError(f"{name} has no option {option!r}{_similar(option, known)}")


def build(
    name: str,
    options: Mapping[str, Any],
    input_dim: int,
    tasks: Sequence[Task],
    *,
    device: Any = None,
) -> MultiTaskNet:
    """Return a network.

    Args:
        name: As for :func:`network`.
        options: Its options by name, plain values of JSON.
        input_dim: Inputs D of a row.
        tasks: What is predicted.
        device: Device of the parameters.

    Raises:
        GatesError: There is no network of that name, or it has no such option or refuses a value.
    """
    check_options(name, options)
    try:
        return network(name)(input_dim, tasks, **options, device=device)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise GatesError(f"{name}: {error}") from error


def _similar(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    lower = {k.lower(): k for k in known}
    close = [lower[name.lower()]] if name.lower() in lower else close
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}; choose from {', '.join(known)}"
