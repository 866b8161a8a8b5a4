"""Multi-task networks from inputs (B, D) to logits (B, T), by name, and of equal size."""

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from core_gates.errors import GatesError, check_positive
from recsys.models.net import ExpertLayer, MultiTaskNet
from recsys.schema import Task

__all__ = [
    "MODELS",
    "ExpertLayer",
    "MultiTaskNet",
    "build",
    "check_options",
    "network",
    "num_weights",
    "options_of",
    "sized",
]

_HOMES = {
    "SingleTask": "mmoe",
    "SharedBottom": "mmoe",
    "OMoE": "mmoe",
    "MMoE": "mmoe",
    "CGC": "ple",
    "PLE": "ple",
    "AdaTT": "adatt",
    "HoME": "home",
    "Linear": "mmoe",
    "WideAndDeep": "wide_and_deep",
}
TOLERANCE = 0.05  # of the size of networks that are compared
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
        name: One of `MODELS`, or the place of another class: ``package.module.Name``.

    Raises:
        GatesError: There is no network of that name, or the class is no `MultiTaskNet`.
    """
    if name in MODELS:
        return MODELS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise GatesError(f"there is no network {name!r}{_similar(name, MODELS)}")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise GatesError(f"the network {name} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, MultiTaskNet)):
        raise GatesError(f"{name} is no network: derive it from recsys.models.MultiTaskNet")
    return kind


def options_of(name: str) -> list[str]:
    """Return the names of the options of a network, those that ``**options`` passes on included.

    Raises:
        GatesError: There is no network of that name.
    """
    return list(_options(name))


def check_options(name: str, options: Iterable[str]) -> None:
    """Refuse an unknown network, or an option that it does not have.

    Raises:
        GatesError: There is no network of that name, or it has no such option.
    """
    defaults = options_of(name)
    for option in options:
        if option not in defaults:
            raise GatesError(f"{name} has no option {option!r}{_similar(option, defaults)}")


def build(
    name: str,
    options: Mapping[str, Any],
    input_dim: int,
    tasks: Sequence[Task],
    *,
    device: Any = None,
) -> MultiTaskNet:
    """Return a new network by its name.

    Args:
        name: As for `network`.
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


def _similar(name: str, choices: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), 1, cutoff=0.5)
    lower = {k.lower(): k for k in choices}
    close = [lower[name.lower()]] if name.lower() in lower else close
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}; choose from {', '.join(choices) or 'none: options {}'}"


def num_weights(
    name: str, options: Mapping[str, Any], input_dim: int, tasks: Sequence[Task]
) -> int:
    """Return the number of weights of a network, embeddings aside, without allocating them.

    Raises:
        GatesError: The network or its options do not exist.
    """
    net = build(name, options, input_dim, tasks, device="meta")
    return sum(parameter.numel() for parameter in net.parameters())


def sized(
    name: str,
    options: Mapping[str, Any],
    input_dim: int,
    tasks: Sequence[Task],
    target: int,
) -> dict[str, Any]:
    """Return options with which a network has ``target`` weights, within 5 %.

    ``dim`` is searched in steps of one, ``hidden_dims`` keep their ratio to it; towers, numbers of
    experts and all else stay. The width nearest to the target is taken.

    Args:
        name: As for `recsys.models.network`.
        options: Its options; widths that are missing are those of the network by default.
        input_dim: Inputs D of a row.
        tasks: What is predicted.
        target: Number of weights, embeddings aside.

    Raises:
        GatesError: No width comes within 5 %, or the options are wrong.
    """
    check_positive(target=target)
    parameters = _options(name)
    first: dict[str, Any] = {
        key: parameters[key].default for key in ("dim", "hidden_dims") if key in parameters
    }
    first.update(options)
    ratios = [width / first["dim"] for width in first.get("hidden_dims") or ()]

    def at(dim: int) -> dict[str, Any]:
        widths: dict[str, Any] = {"dim": dim}
        if ratios:
            widths["hidden_dims"] = [max(1, round(ratio * dim)) for ratio in ratios]
        return {**options, **widths}

    def weights(dim: int) -> int:
        return num_weights(name, at(dim), input_dim, tasks)

    low, high = 1, 2
    while (count := weights(high)) < target:
        if high > target and count == weights(low):
            raise GatesError(
                f"{name} cannot have {target:,} weights: it has {count:,} whatever its dim, which "
                "these options leave without effect; change hidden_dims or tower_dims"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if weights(middle) < target else (low, middle)
    best = min((low, high), key=lambda dim: abs(weights(dim) - target))
    if abs((count := weights(best)) - target) > TOLERANCE * target:
        raise GatesError(
            f"{name} cannot have {target:,} weights: at dim={best} it has {count:,}; "
            "change its number of experts or its tower_dims"
        )
    return at(best)


def _options(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of a network; a class that takes ``**options`` has those of its base."""
    parameters_of_net: dict[str, inspect.Parameter] = {}
    for kind in network(name).__mro__:
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
        passed = [
            n for n, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD
        ]
        excluded = (*_FIXED, *passed, *parameters_of_net)
        parameters_of_net |= {
            n: parameter for n, parameter in parameters.items() if n not in excluded
        }
        if not passed:
            break
    return parameters_of_net
