"""Networks of equal size, for fair comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any

from core_gates.errors import GatesError, check_positive
from recsys.models import build, network, options_of
from recsys.schema import Task

TOLERANCE = 0.05


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
        name: As for :func:`recsys.models.network`.
        options: Its options; widths that are missing are those of the network by default.
        input_dim: Inputs D of a row.
        tasks: What is predicted.
        target: Number of weights, embeddings aside.

    Raises:
        GatesError: No width comes within 5 %, or the options are wrong.
    """
    check_positive(target=target)
    first = {**_widths(name), **options}
    ratios = [width / first["dim"] for width in first.get("hidden_dims") or ()]

    def at(dim: int) -> dict[str, Any]:
        widths: dict[str, Any] = {"dim": dim}
        if ratios:
            widths["hidden_dims"] = [max(1, round(ratio * dim)) for ratio in ratios]
        return {**options, **widths}

    def weights(dim: int) -> int:
        return num_weights(name, at(dim), input_dim, tasks)

    low, high = 1, 2
    while (found := weights(high)) < target:
        if high > target and found == weights(low):
            raise GatesError(
                f"{name} cannot have {target:,} weights: it has {found:,} whatever its dim, which "
                "these options leave without effect; change hidden_dims or tower_dims"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if weights(middle) < target else (low, middle)
    best = min((low, high), key=lambda dim: abs(weights(dim) - target))
    if abs((found := weights(best)) - target) > TOLERANCE * target:
        raise GatesError(
            f"{name} cannot have {target:,} weights: at dim={best} it has {found:,}; "
            "change its number of experts or its tower_dims"
        )
    return at(best)


def _widths(name: str) -> dict[str, Any]:
    import inspect

    options_of(name)
    parameters = inspect.signature(network(name).__init__).parameters
    return {key: parameters[key].default for key in ("dim", "hidden_dims") if key in parameters}
