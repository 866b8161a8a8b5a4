"""How a budget for experts is used: what stays, what is guessed, in how many bits it travels."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from core_gates.errors import GatesError, check_option
from language.offload.allocation import Allocation, allocate

Policy = Literal["lru", "slru", "lfu", "lfru", "lifo", "arc", "static"]
Predicting = Literal[
    "none", "all", "cross-layer", "path", "frequency", "ngram", "oracle", "ngram-first"
]
Transferred = Literal["stored", "int4", "int2", "hybrid"]
TRANSFERS: tuple[Transferred, ...] = get_args(Transferred)
NAMES = {"policy": get_args(Policy), "predictor": get_args(Predicting), "transfer": TRANSFERS}


class Sizes(NamedTuple):
    """How many experts there are, and how large.

    Attributes:
        layers: Layers with experts, L.
        experts: Experts of a layer.
        k: Experts that a token uses.
        bytes: Size of an expert.
        weights: Its weights.
        digest: What tells experts of other models apart; empty if it is not known.
    """

    layers: int
    experts: int
    k: int
    bytes: int
    weights: int
    digest: str = ""


@dataclass
class Used:
    """How experts were used.

    Attributes:
        hits: Uses of experts that were there.
        guessed: Uses of experts that were guessed, and read or on their way.
        late: Those of them that had to be waited for.
        bytes: What was requested, or read.
        stall: Seconds that tokens waited.
    """

    hits: int = 0
    guessed: int = 0
    late: int = 0
    bytes: int = 0
    stall: float = 0.0


@dataclass(frozen=True)
class Setup:
    """How a budget for experts is used.

    Args:
        policy: Which expert leaves its slot for another one.
        allocation: How layers divide the slots: evenly, or the first layers first.
        predictor: What is fetched before it is needed.
        width: Experts that are guessed for one token, each in a slot of the budget; if null, as
            many as a token uses, or all with ``all``.
        transfer: Numbers that experts travel in; ``hybrid`` is INT4, and INT2 for the quarter of
            the guessed experts of a prompt that is least popular, if any are guessed.
    """

    policy: Policy = "lru"
    allocation: Allocation = "uniform"
    predictor: Predicting = "none"
    width: int | None = None
    transfer: Transferred = "stored"

    def __post_init__(self) -> None:
        """Check names, and that a width is a number of guesses.

        Raises:
            GatesError: A name is unknown, or there is a width that is not a whole number, or
                nothing is guessed.
        """
        for name, known in NAMES.items():
            check_option(name, getattr(self, name), known, GatesError)
        if self.width is not None and type(self.width) is not int:
            raise GatesError(f"width is {self.width!r}, expected a whole number of guesses or null")
        if self.predictor == "none" and self.width is not None:
            raise GatesError(
                f"width {self.width} is for guesses: give a predictor, or leave it out"
            )

    def guesses(self, k: int, experts: int) -> int:
        """Return the slots that guesses take.

        Args:
            k: Experts that a token uses.
            experts: Experts of a layer.

        Raises:
            GatesError: The width is out of range.
        """
        if self.predictor == "none":
            return 0
        wide = experts if self.predictor == "all" else k
        width = wide if self.width is None else self.width
        if not k <= width <= experts:
            raise GatesError(f"width is {width}, expected {k} to {experts} guesses for a token")
        return width

    def slots(self, budget: int, sizes: Sizes) -> list[int]:
        """Return the number of slots of each layer; the budget keeps room for guessed experts.

        Args:
            budget: Experts that there is memory for.
            sizes: Of the model.

        Raises:
            GatesError: The budget is below the experts of one token for each layer and the guesses.
        """
        layers, experts, k, each, *_ = sizes
        width = self.guesses(k, experts)
        if budget < k * layers + width:
            ahead = f" and guesses {width} more" if width else ""
            raise GatesError(
                f"the budget holds {budget} experts of {each:,} bytes, but {layers} layers need"
                f" {k} each{ahead}: give at least {(k * layers + width) * each:,} bytes"
            )
        return allocate(self.allocation, budget - width, layers=layers, experts=experts, least=k)


ON_DEMAND = Setup()
"""Nothing is guessed, and the least recently used leaves."""
