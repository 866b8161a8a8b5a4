"""Errors that a user can fix: one line with what was found, what was expected, what to do."""

from collections.abc import Iterable
from math import isfinite
from numbers import Integral, Real
from typing import Self


class GatesError(Exception):
    """An expected failure; commands print it as one line and exit with code 2."""


class MissingExtraError(GatesError, ModuleNotFoundError):
    """A package of an optional extra is not installed.

    Args:
        extra: Name of the extra, in messages also of the application that needs it.
        package: The distribution that is missing.
        module: What is imported, where its name is another one.
    """

    def __init__(self, extra: str, package: str, module: str | None = None) -> None:
        needs = "gatesuite" if extra == "all" else extra
        line = f"{needs} needs {package}: pip install 'gatesuite[{extra}]'"
        super().__init__(line, name=module or package)
        self.extra, self.package = extra, package

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str | None]]:
        """Raised in another process, it arrives as it was."""
        return type(self), (self.extra, self.package, self.name)


def check_option(
    name: str, found: object, known: Iterable[str], error: type[Exception] = ValueError
) -> None:
    """Refuse a value of an option that is none of those known.

    Args:
        name: Name of the option.
        found: The value given.
        known: The values that it may have.
        error: What is raised; `GatesError` outside of constructors.

    Raises:
        ValueError: ``found`` is none of ``known``.
    """
    if found not in (options := tuple(known)):
        raise error(f"{name} is {found!r}; choose one of {', '.join(options)}")


def check_at_least(least: float, **found: float | None) -> None:
    """Refuse numbers below ``least``, and NaN; None stands for an option that is not used.

    Raises:
        ValueError: One of ``found`` is too small.
    """
    for name, value in found.items():
        if value is not None and not value >= least:
            wanted = f"be at least {least}" if least else "not be negative"
            raise ValueError(f"{name} must {wanted}, got {value}")


def check_whole(least: int, **found: object) -> None:
    """Refuse what is not a whole number of at least ``least``; True and False are none.

    Raises:
        ValueError: One of ``found`` is too small, or is something else.
    """
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        check_at_least(least, **{name: int(value)})


def check_finite(**found: object) -> None:
    """Refuse what is not a finite number; None stands for an option that is not used.

    Raises:
        ValueError: One of ``found`` is NaN, infinite, or no number.
    """
    for name, value in found.items():
        if value is not None and not (isinstance(value, Real) and isfinite(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_positive(**found: float | None) -> None:
    """Refuse numbers that are not above 0; None stands for an option that is not used.

    Raises:
        ValueError: One of ``found`` is not positive.
    """
    for name, value in found.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_fraction(**found: float) -> None:
    """Refuse numbers outside of [0, 1).

    Raises:
        ValueError: One of ``found`` is negative, at least 1, or NaN.
    """
    for name, value in found.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
