"""How many experts of each layer stay in memory."""

from typing import Literal, get_args

from core_gates.errors import GatesError, check_option

Allocation = Literal["uniform", "shallow"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


def allocate(how: str, budget: int, *, layers: int, experts: int, least: int) -> list[int]:
    """Return the number of slots of each layer, the first layer first.

    Args:
        how: ``uniform`` divides the budget evenly, what remains goes to the first layers;
            ``shallow`` gives ``least`` to each layer and fills the first layers with the rest,
            since the experts of early layers are predicted worst (Fate, arXiv 2502.12224).
        budget: Slots of all layers together, ``least`` for each or more; more than there are
            experts are not used.
        layers: Layers with experts.
        experts: Experts of each layer.
        least: Slots that each layer needs, the experts of one token.

    Raises:
        GatesError: ``how`` is unknown.
    """
    check_option("allocation", how, ALLOCATIONS, GatesError)
    budget = min(budget, layers * experts)
    if how == "uniform":
        each, rest = divmod(budget, layers)
        return [each + (layer < rest) for layer in range(layers)]
    rest, room = budget - least * layers, experts - least
    return [least + min(max(0, rest - layer * room), room) for layer in range(layers)]
