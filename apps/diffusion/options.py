"""Options that several training runs share."""

import math
from typing import Literal

from core_gates.errors import GatesError

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def refuse_unless_positive(**numbers: float | None) -> None:
    """Refuse numbers that are not positive and finite.

    Raises:
        GatesError: One is not.
    """
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise GatesError(f"--{name} is {number}, expected a positive number")


def refuse_unless_share(**numbers: float) -> None:
    """Refuse numbers that are not a fraction.

    Raises:
        GatesError: One does not lie from 0 to below 1.
    """
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise GatesError(f"--{name} is {number}, expected a fraction from 0 to below 1")


def refuse_unless_text(prompt: str) -> None:
    """Refuse a prompt that is not in UTF-8, which no text encoder takes.

    Raises:
        GatesError: There are some.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise GatesError(
            f"the prompt is not in UTF-8 at letter {error.start + 1}: write it in UTF-8"
        ) from error
