"""Options that take one of a few values."""

from typing import Any, get_args


def check_option(name: str, value: object, kind: Any) -> None:
    """Refuse a value that is not in a ``Literal``; a typo must not pass for another choice.

    Args:
        name: Of the option, for the message.
        value: What was given.
        kind: The ``Literal``.

    Raises:
        ValueError: It is none of them.
    """
    if value not in get_args(kind):
        raise ValueError(
            f"{name} is {value!r}; choose one of {', '.join(map(str, get_args(kind)))}"
        )
